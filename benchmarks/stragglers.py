"""How long one slow request delays a rollout batch, with and without over-sampling.

    python benchmarks/stragglers.py [--output benchmarks/results/stragglers.json]

The fake engine behind the real client: every request takes `USUAL_S`, in the slow batches one takes ten times that. A
request has no model behind it, so the figures are those of waiting, not of sampling.
"""

from __future__ import annotations

import argparse
import json
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
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.types import Completion, Prompt, SamplingParams

ROOT = Path(__file__).parents[1]
USUAL_S, TURNS, GROUPS, MEMBERS, ROUNDS = 0.2, 3, 8, 4, 5


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
def serving() -> Iterator[Any]:
    with create_engine(EngineOptions("unused", kind="fake", request_timeout_s=60.0)) as engine:
        engine.begin_update(1)
        engine.load(pack(1, 0, [("weight", torch.ones(4))]))
        engine.commit_update(1, 1)
        yield engine


def batch_seconds(engine: Any, over_sampling: float, stragglers: Any, *, slow: bool) -> float:
    faults = [{"path": "/generate", "do": "sleep", "seconds": USUAL_S, "times": 10**6}]
    if slow:
        faults.append({"path": "/generate", "do": "sleep", "seconds": 10 * USUAL_S, "after": 20, "times": 1})
    headers = {"Authorization": f"Bearer {engine.server.admin_key}"}
    url = f"http://127.0.0.1:{engine.server.port}/script"
    httpx.post(url, json={"faults": faults}, headers=headers, trust_env=False).raise_for_status()
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
    cases = {
        "no slow request": (1.0, "abort", False),
        "one slow request, all awaited": (1.0, "abort", True),
        "one slow request, over_sampling 1.25, abort": (1.25, "abort", True),
        "one slow request, over_sampling 1.25, resume": (1.25, "resume", True),
    }
    report: dict[str, Any] = {"usual_request_s": USUAL_S, "turns": TURNS, "groups": GROUPS, "members": MEMBERS}
    with serving() as engine:
        batch_seconds(engine, 1.0, "abort", slow=False)
        for name, (over, stragglers, slow) in cases.items():
            found = [batch_seconds(engine, over, stragglers, slow=slow) for _ in range(ROUNDS)]
            report[name] = {"median_s": round(statistics.median(found), 3), "all_s": [round(one, 3) for one in found]}
            print(f"{name:45} {report[name]['median_s']:.3f} s", flush=True)
    usual = report["no slow request"]["median_s"]
    for name in list(cases)[1:]:
        report[name]["times_usual"] = round(report[name]["median_s"] / usual, 2)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
