"""Which engine gets the next turn of a session, and how much of its prompt is cached there: two real engines on a CPU.

    python benchmarks/routing.py [--output benchmarks/results/routing_cpu.json]

Sessions of several turns; all sessions' requests of a turn are sent at the same time, each prompt is the last one, its
completion and some new tokens. "cached" is SGLang's own count (meta_info.cached_tokens) as a share of the tokens that
the turn before has left; "engines" are the requests that each engine got.

    client        `EngineClient`'s own choice: where the session is, or least runs
    in turns      one engine after the other, whatever the session
    manual        sglang-router, X-SMG-Routing-Key: session
    cache_aware   sglang-router's default policy
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.engine import EngineOptions, create_engines  # noqa: E402
from megatron_sglang.engine.client import Address, EngineClient  # noqa: E402
from megatron_sglang.engine.router import SESSION_HEADER, Router  # noqa: E402

MODEL = ROOT / "examples" / "tiny_fim" / "model"
SESSIONS, TURNS, FIRST, MORE, SAMPLED = 16, 5, 40, 16, 8
Choose = Callable[[str], AbstractContextManager[tuple[str, dict[str, str]]]]


async def measure(choose: Choose, seed: int) -> dict[str, Any]:
    """choose: session -> URL and headers, for as long as the request runs."""
    source = random.Random(seed)
    fresh = lambda count: [source.randrange(5, 500) for _ in range(count)]  # noqa: E731
    histories = {f"{seed}-{number}": fresh(FIRST) for number in range(SESSIONS)}
    served: Counter[str] = Counter()
    cached = possible = 0
    began = time.perf_counter()
    async with httpx.AsyncClient(trust_env=False, timeout=120.0) as client:
        for turn in range(TURNS):

            async def ask(session: str, history: list[int]) -> dict[str, Any]:
                sampling = {"temperature": 1.0, "max_new_tokens": SAMPLED, "ignore_eos": True}
                body = {"input_ids": history, "sampling_params": sampling}
                with choose(session) as (url, headers):
                    answer = await client.post(f"{url}/generate", json=body, headers=headers)
                answer.raise_for_status()
                return answer.json()

            # In another order each time: whoever deals them out in turns would else be sticky by accident.
            order = source.sample(sorted(histories), SESSIONS)
            replies = await asyncio.gather(*(ask(session, histories[session]) for session in order))
            for history, reply in zip((histories[session] for session in order), replies, strict=True):
                served[reply["meta_info"]["weight_version"]] += 1
                if turn:
                    cached += reply["meta_info"]["cached_tokens"]
                    possible += len(history) - MORE
                history += reply["output_ids"] + fresh(MORE)
    return {
        "cached": cached / possible,
        "engines": [served[name] for name in sorted(served)],
        "seconds": time.perf_counter() - began,
    }


async def by_client(addresses: Sequence[Address], keys: dict[str, dict[str, str]]) -> dict[str, Any]:
    async with EngineClient(addresses) as client:

        @contextmanager
        def choose(session: str) -> Iterator[tuple[str, dict[str, str]]]:
            http = client._choose(session)
            http.load += 1
            yield http.address.url, keys[http.address.url]
            http.load -= 1

        return await measure(choose, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    options = EngineOptions(
        str(MODEL), dtype="float32", device="cpu", load_format="auto", deterministic=False, max_total_tokens=32768,
        mem_fraction=0.1, update_timeout_s=120.0,
    )  # fmt: skip
    found: dict[str, Any] = {"sessions": SESSIONS, "turns": TURNS}
    with create_engines(options, 2) as engines:
        keys = {one.url: {"Authorization": f"Bearer {one.api_key}"} for one in engines.addresses}
        for number, engine in enumerate(engines.engines):  # who served is seen by the version
            engine.connected.post("/update_weight_version", {"new_version": str(number)}, 60.0)

        urls, turns = list(keys), itertools.count()
        found["client"] = asyncio.run(by_client(engines.addresses, keys))
        found["in turns"] = asyncio.run(measure(lambda _: nullcontext((url := urls[next(turns) % 2], keys[url])), 2))
        for seed, policy in enumerate(("manual", "cache_aware"), 3):
            with Router(engines, policy=policy) as router:
                key = {"Authorization": f"Bearer {router.address.api_key}"}
                choose = lambda session: nullcontext((router.address.url, {**key, SESSION_HEADER: session}))  # noqa: B023, E731
                found[policy] = asyncio.run(measure(choose, seed))
    found["machine"] = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
