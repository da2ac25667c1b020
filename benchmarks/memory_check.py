"""What `megatron-sglang plan` says of memory beside what runs took: `python benchmarks/memory_check.py [--output F]`.

The runs are those of the flagship on one and two H200s of which benchmarks/results/cycle_*.json tell (`RUNS`). trainer:
peak of tensors of the fullest rank; device: all that is not free there. Needs no GPU. `off` is planned over measured,
less 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.placement import Placement  # noqa: E402
from megatron_sglang.plan import memory, shapes  # noqa: E402
from megatron_sglang.plan.trainer import Trainer  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
MODEL = ROOT / "examples/qwen3_30b_a3b"


@dataclass(frozen=True)
class Run:
    """What the plan has to know of one."""

    name: str
    file: str
    gpus: int
    tokens: int
    """Of a micro-batch: trained tokens of a batch, by ranks and by micro-batches of a rank."""
    job: dict[str, Any] = field(default_factory=dict)
    within: str = ""
    """Of the file, where it has several."""


ALONE = {"lora_rank": 8, "mem_fraction": 0.46}
RUNS = (
    Run("2 GPUs, replay", "cycle_replay_h200_2.json", 2, 11_100),
    Run("2 GPUs, 31 recomputed", "cycle_block_h200_2.json", 2, 11_100, {"recomputed": 31}),
    Run("1 GPU", "cycle_h200_1.json", 1, 5_900, ALONE, "replay off"),
    Run("1 GPU, replay", "cycle_h200_1.json", 1, 5_900, ALONE, "replay on"),
)
BUFFERS = 970_000_000
"""Of an update in buckets of 480 MB, send and receive (docs/weight_sync.md)."""
OPPOSITE = {"min": "max", "median": "median", "max": "min"}
"""Most is used where least is free."""


def rows() -> list[dict[str, Any]]:
    """One of each run, phase and part."""
    model = shapes.hub_shapes(MODEL)
    found = []
    for run in RUNS:
        trainer = Trainer(model, shapes.heads(MODEL), Placement(world_size=run.gpus, ep=run.gpus))
        job = memory.Job(1, run.tokens, experts_per_token=shapes.experts_per_token(MODEL), **run.job)
        planned = memory.peaks_of(model, trainer, job, [BUFFERS] * run.gpus)[0]
        record = json.loads((RESULTS / run.file).read_text())
        took = (record["runs"][run.within] if run.within else record)["memory_gb"]
        for phase in planned.trainer:
            free = took[f"{phase}_free"]
            device = {name: memory.H200_BYTES / memory.GB - free[other] for name, other in OPPOSITE.items()}
            for part, plan, of_run in (
                ("trainer", planned.trainer[phase], took[f"{phase}_allocated"]),
                ("device", planned.device[phase], device),
            ):
                found.append(
                    {"run": run.name, "file": run.file, "phase": phase, "part": part, "planned_gb": plan / memory.GB}
                    | {"measured_gb": of_run, "off": plan / memory.GB / of_run["median"] - 1}
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    found = rows()
    for row in found:
        took = row["measured_gb"]
        print(
            f"{row['run']:22} {row['phase']:8} {row['part']:8} planned {row['planned_gb']:6.1f} GB, measured "
            f"{took['median']:6.1f} ({took['min']:.1f} to {took['max']:.1f}), {row['off']:+.0%}"
        )
    if chosen.output:
        chosen.output.write_text(json.dumps({"command": "benchmarks/memory_check.py", "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
