"""How long one slow request, and one slow engine, delays a rollout batch, with and without over-sampling.

    python benchmarks/stragglers.py [--output benchmarks/results/stragglers.json]

Fake engines behind the real client: every request takes `USUAL_S`, in the slow batches one takes ten times that, or all
of one engine do. A request has no model behind it, so the figures are those of waiting, not of sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from megatron_sglang.agents import AgentRollout
from megatron_sglang.agents.environment import Environments, Limits, Services, Step
from megatron_sglang.buckets import pack
from megatron_sglang.engine import EngineOptions, create_engines
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.training.modes import members
from megatron_sglang.types import Completion, Prompt, SamplingParams

ROOT = Path(__file__).parents[1]
USUAL_S, TURNS, GROUPS, MEMBERS, ROUNDS = 0.5, 3, 8, 4, 3
CASES: dict[int, dict[str, tuple[float, str, str]]] = {
    1: {
        "no slow request": (1.0, "abort", ""),
        "one slow request, all awaited": (1.0, "abort", "request"),
        "one slow request, over_sampling 1.25, abort": (1.25, "abort", "request"),
        "one slow request, over_sampling 1.25, resume": (1.25, "resume", "request"),
    },
    2: {
        "2 engines, none slow": (1.0, "abort", ""),
        "2 engines, one slow, all awaited": (1.0, "abort", "engine"),
        "2 engines, one slow, over_sampling 1.25, abort": (1.25, "abort", "engine"),
        "2 engines, one slow, over_sampling 2, abort": (2.0, "abort", "engine"),
    },
    4: {
        "4 engines, none slow": (1.0, "abort", ""),
        "4 engines, one slow, all awaited": (1.0, "abort", "engine"),
        "4 engines, one slow, over_sampling 1.375, abort": (1.375, "abort", "engine"),
        "4 engines, one slow, over_sampling 1.375, resume": (1.375, "resume", "engine"),
    },
}
"""By number of engines: over-sampling, stragglers, and what takes ten times as long; the first is the usual."""


class Turns:
    """Ends after `TURNS` turns."""

    def __init__(self, services: Services) -> None:
        self.left = TURNS

    def reset(self, prompt: Prompt) -> str:
        return ""

    async def step(self, turn: Completion) -> Step:
        self.left -= 1
        return Step("again\n", float(sum(turn.token_ids_T) % 2), self.left == 0)

    async def close(self) -> None: ...


@contextmanager
def serving(count: int) -> Iterator[Any]:
    """So many engines, as one."""
    with create_engines(EngineOptions("unused", kind="fake", request_timeout_s=60.0), count) as engines:
        engines.begin_update(1)
        engines.load(pack(1, 0, [("weight", torch.ones(4))]))
        engines.commit_update(1, 1)
        yield engines


def script(engine: Any, *faults: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {engine.server.admin_key}"}
    url = f"http://127.0.0.1:{engine.server.port}/script"
    httpx.post(url, json={"faults": faults}, headers=headers, trust_env=False).raise_for_status()


def batch_seconds(engine: Any, over_sampling: float, stragglers: Any, slow: str) -> float:
    """slow: "", "request" or "engine"."""
    usual = {"path": "/generate", "do": "sleep", "seconds": USUAL_S, "times": 10**6}
    for place, one in enumerate(members(engine)):
        whole = slow == "engine" and place == 0
        faults = [usual | {"seconds": 10 * USUAL_S}] if whole else [usual]
        if slow == "request" and place == 0:
            faults.append({"path": "/generate", "do": "sleep", "seconds": 10 * USUAL_S, "after": 20, "times": 1})
        script(one, *faults)
    rollout = AgentRollout(
        engine.client,
        None,  # type: ignore[arg-type]  # Turns asks no verifier
        Environments("turns", Limits(max_turns=TURNS), Turns),
        lambda ids: "",
        lambda text: tuple(text.encode()),
        SamplingParams(max_new_tokens=64, stop_token_ids=(0,)),
        group_size=MEMBERS,
        seed=1,
        over_sampling=over_sampling,
        stragglers=stragglers,
    )
    prompts = [Prompt(f"p{number}", (number + 1, 2), "none") for number in range(64)]
    began = time.perf_counter()
    groups = rollout.batch(PromptSource(prompts, GROUPS), 0)
    assert len(groups) == GROUPS
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/stragglers.json")
    chosen = parser.parse_args()
    report: dict[str, Any] = {"usual_request_s": USUAL_S, "turns": TURNS, "groups": GROUPS, "members": MEMBERS}
    for count, cases in CASES.items():
        with serving(count) as engine:
            batch_seconds(engine, 1.0, "abort", "")
            for name, (over, stragglers, slow) in cases.items():
                found = [batch_seconds(engine, over, stragglers, slow) for _ in range(ROUNDS)]
                median = statistics.median(found)
                report[name] = {"median_s": round(median, 3), "all_s": [round(one, 3) for one in found]}
                report[name]["times_usual"] = round(median / report[next(iter(cases))]["median_s"], 2)
                print(f"{name:52} {median:.3f} s, {report[name]['times_usual']} of the usual", flush=True)
    report["machine"] = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    chosen.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
