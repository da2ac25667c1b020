"""Ten thousand requests at the same time through the endpoint, and what it costs: is one lost, doubled or mixed up?

    python benchmarks/serve_load.py [--requests 10000] [--kind fake] [--output benchmarks/results/serve_load.json]

Starts an engine with the example's model and `megatron-sglang serve` beside it, each in processes of its own. Every
request has its own seed and prompt; its answer must be what the same engine says when it is asked directly. The same
requests then go to bare SGLang. Memory and descriptors of the endpoint are sampled all the while. At the end requests
go one by one by three ways, which gives the milliseconds that our client and our endpoint add.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from launch import interruptible

from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.serve.http import raise_descriptor_limit
from megatron_sglang.types import GenerateRequest, SamplingParams

ROOT = Path(__file__).parents[1]
KEY = "k" * 40
DEADLINE_S = 3000.0
CONNECT_S = 120.0


def requests_of(count: int, tokens: int) -> list[GenerateRequest]:
    """No two alike."""
    ids = [(5 + n % 500, 5 + n // 500 % 500, 40 + n % 7) for n in range(count)]
    return [GenerateRequest(one, SamplingParams(max_new_tokens=tokens, seed=n)) for n, one in enumerate(ids)]


# ---- a client that costs little ----


async def post(port: int, path: str, key: str, body: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
    """One request on a connection of its own: (seconds from connecting to the last byte, status, JSON)."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    began = time.perf_counter()
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + content)
        async with asyncio.timeout(DEADLINE_S):
            reply = await reader.read()
    finally:
        writer.close()
    top, _, rest = reply.partition(b"\r\n\r\n")
    return time.perf_counter() - began, int(top.split()[1]), json.loads(rest)


async def all_at_once(port: int, path: str, key: str, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    """Every request at the same time; an error in the place of an answer."""
    return await asyncio.gather(*(post(port, path, key, body) for body in bodies), return_exceptions=True)


def spread(seconds: Sequence[float], unit: float = 1.0) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * unit, 3), "p99": round(cuts[98] * unit, 3)}


# ---- the endpoint, in a process of its own ----


@contextlib.contextmanager
def endpoint(run_folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Its port and its process."""
    command = [sys.executable, "-m", "megatron_sglang.cli", "serve", "--run", str(run_folder), "--port", "0"]
    environment = {**os.environ, "MEGATRON_SGLANG_API_KEY": KEY}
    # This script too is busy for a while before each of ten thousand connections has its turn to send.
    command += ["--request-s", str(DEADLINE_S), "--head-s", str(CONNECT_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        yield int(said.split("://")[1].split(":")[1].split("/")[0]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


class Sampler:
    """Memory and descriptors of a process, while it works."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.rss_mb: list[float] = []
        self.descriptors: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def now(self) -> dict[str, float]:
        return {"rss_mb": round(self.process.memory_info().rss / 2**20, 1), "descriptors": self.process.num_fds()}

    def _run(self) -> None:
        while not self._over.wait(0.5):
            found = self.now()
            self.rss_mb.append(found["rss_mb"])
            self.descriptors.append(int(found["descriptors"]))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


# ---- the three measurements ----


def through_the_endpoint(
    port: int, process: psutil.Process, asked: Sequence[GenerateRequest], expected: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """One round; fails if an answer is missing, doubled or another one's."""
    bodies = [
        {
            "prompt": one.token_ids_T,
            "seed": one.sampling.seed,
            "max_tokens": one.sampling.max_new_tokens,
            "return_token_ids": True,
        }
        for one in asked
    ]
    began = time.perf_counter()
    with Sampler(process) as sampler:
        answers = asyncio.run(all_at_once(port, "/v1/completions", KEY, bodies))
    seconds = time.perf_counter() - began
    errors = [str(one) for one in answers if isinstance(one, BaseException)]
    whole = [one for one in answers if not isinstance(one, BaseException)]
    statuses = {status: sum(one[1] == status for one in whole) for status in {one[1] for one in whole}}
    lost = len(asked) - statuses.get(200, 0)
    wrong = sum(
        isinstance(one, BaseException) or one[1] != 200 or tuple(one[2]["choices"][0]["token_ids"]) != ids
        for one, ids in zip(answers, expected, strict=True)
    )
    distinct = len({one[2]["id"] for one in whole if one[1] == 200})
    time.sleep(2)
    found = {
        "seconds": round(seconds, 1),
        "statuses": statuses,
        "lost": lost,
        "doubled": statuses.get(200, 0) - distinct,
        "wrong": wrong - lost,
        "latency_s": spread([one[0] for one in whole]),
        "peak_rss_mb": max(sampler.rss_mb),
        "peak_descriptors": max(sampler.descriptors),
        "afterwards": sampler.now(),
    }
    print(json.dumps(found), errors[:3], flush=True)
    return found


def bare(engine: HttpEngine, asked: Sequence[GenerateRequest], expected: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """The same to SGLang itself."""
    bodies = [_bare_body(one) for one in asked]
    began = time.perf_counter()
    answers = asyncio.run(all_at_once(engine.server.port, "/generate", engine.server.api_key, bodies))
    whole = [one for one in answers if not isinstance(one, BaseException)]
    right = sum(
        not isinstance(one, BaseException) and one[1] == 200 and tuple(one[2]["output_ids"]) == ids
        for one, ids in zip(answers, expected, strict=True)
    )
    found = {"seconds": round(time.perf_counter() - began, 1), "latency_s": spread([one[0] for one in whole])}
    found |= {"lost_or_wrong": len(asked) - right}
    print(json.dumps(found), flush=True)
    return found


def _bare_body(one: GenerateRequest) -> dict[str, Any]:
    sampling = one.sampling
    params = {"temperature": 1.0, "max_new_tokens": sampling.max_new_tokens, "sampling_seed": sampling.seed}
    params |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop_token_ids": []}
    return {"input_ids": one.token_ids_T, "sampling_params": params, "return_logprob": True}


async def one_by_one(port: int, engine: HttpEngine, count: int) -> dict[str, Any]:
    """Milliseconds of a request of one token by three ways, in turns, on connections that stay."""
    import httpx

    asked = requests_of(count, 1)
    taken: dict[str, list[float]] = {"bare": [], "client": [], "endpoint": []}
    async with (
        _http(engine.server.port, engine.server.api_key) as straight,
        _http(port, KEY) as proxy,
        engine.client() as client,
    ):

        async def ask(way: str, one: GenerateRequest) -> None:
            began = time.perf_counter()
            if way == "client":
                assert (await client.generate(one)).finish_reason in ("length", "stop")
            else:
                http: httpx.AsyncClient = straight if way == "bare" else proxy
                body = {"prompt": one.token_ids_T, "seed": one.sampling.seed, "max_tokens": 1}
                path, body = ("/generate", _bare_body(one)) if way == "bare" else ("/v1/completions", body)
                (await http.post(path, json=body)).raise_for_status()
            taken[way].append(time.perf_counter() - began)

        for way in taken:
            await ask(way, asked[0])
            taken[way].clear()
        for one in asked:
            for way in taken:
                await ask(way, one)
    found: dict[str, Any] = {way: spread(seconds, 1e3) for way, seconds in taken.items()}
    for way in ("client", "endpoint"):
        added = [seconds - base for seconds, base in zip(taken[way], taken["bare"], strict=True)]
        found[f"{way} adds"] = {"p50": round(statistics.median(added) * 1e3, 3)}
        found[f"{way} adds"]["p99"] = round(found[way]["p99"] - found["bare"]["p99"], 3)
    print(json.dumps(found), flush=True)
    return found


@contextlib.asynccontextmanager
async def _http(port: int, key: str) -> AsyncIterator[Any]:
    import httpx

    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=60
    ) as http:
        yield http


def expected_of(engine: HttpEngine, asked: Sequence[GenerateRequest]) -> list[tuple[int, ...]]:
    """What the engine says to each, asked directly, at most 256 at a time."""

    async def ask() -> list[tuple[int, ...]]:
        async with EngineClient(engine.addresses, concurrency=256, timeout_s=DEADLINE_S) as client:
            return [one.token_ids_T for one in await asyncio.gather(*map(client.generate, asked))]

    return asyncio.run(ask())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_fim" / "model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=4, help="sampled by each request")
    parser.add_argument("--rounds", type=int, default=2, help="through the endpoint")
    parser.add_argument("--single", type=int, default=300, help="requests one by one, for the overhead")
    parser.add_argument("--kind", choices=("sglang", "fake"), default="sglang")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    raise_descriptor_limit()
    extra = {"vocab_size": 512} if args.kind == "fake" else {}
    more = {} if args.kind == "fake" else {"max_total_tokens": 65536, "max_running_requests": 256, "mem_fraction": 0.1}
    options = EngineOptions(
        str(args.model), kind=args.kind, tp_size=args.tp, dtype="float32", load_format="auto", extra=extra, **more
    )
    asked = requests_of(args.requests, args.tokens)
    with interruptible(), tempfile.TemporaryDirectory() as folder, create_engine(options) as engine:
        engine.announce(Path(folder, NAME))
        expected = expected_of(engine, asked)
        print(f"{len(asked)} expected answers, {len(set(expected))} different", flush=True)
        with endpoint(Path(folder)) as (port, process):
            before = Sampler(process).now()
            single = asyncio.run(one_by_one(port, engine, args.single))
            rounds = [through_the_endpoint(port, process, asked, expected) for _ in range(args.rounds)]
        straight = bare(engine, asked, expected)
    found = {
        "command": " ".join(["python", "benchmarks/serve_load.py", *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in ("sglang", "torch", "uvicorn", "fastapi", "httpx")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end",
        "engine": f"{args.kind}, tp={args.tp}, {args.model.parent.name}",
        "requests": args.requests,
        "tokens_each": args.tokens,
        "endpoint_before": before,
        "rounds": rounds,
        "bare_engine": straight,
        "one_by_one_ms": single,
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    failed = [one for one in rounds if one["lost"] or one["doubled"] or one["wrong"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
