"""What `megatron-sglang plan` says of memory beside what runs took: `python benchmarks/memory_check.py [--output F]`.

The runs are those of the flagship on two H200s of which benchmarks/results/cycle_*.json tell, each with the tokens of
its micro-batches and the layers that it recomputed. trainer: peak of tensors of the fullest rank; device: all that is
not free there. Needs no GPU. `off` is planned over measured, less 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.placement import Placement  # noqa: E402
from megatron_sglang.plan import memory, shapes  # noqa: E402
from megatron_sglang.plan.trainer import Trainer  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
MODEL = ROOT / "examples/qwen3_30b_a3b"
TOKENS = 11_100
"""Of a micro-batch: 44,400 trained tokens of a batch in two steps on two ranks, one micro-batch each."""
RUNS = {"cycle_replay_h200_2.json": None, "cycle_block_h200_2.json": 31}
"""Layers recomputed; None: all 48."""
BUFFERS = 970_000_000
"""Of an update in buckets of 480 MB, send and receive (docs/weight_sync.md)."""
OPPOSITE = {"min": "max", "median": "median", "max": "min"}
"""Most is used where least is free."""


def rows() -> list[dict[str, Any]]:
    """One of each run, phase and part."""
    model = shapes.hub_shapes(MODEL)
    trainer = Trainer(model, shapes.heads(MODEL), Placement(world_size=2, ep=2))
    found = []
    for run, recomputed in RUNS.items():
        job = memory.Job(1, TOKENS, experts_per_token=shapes.experts_per_token(MODEL), recomputed=recomputed)
        planned = memory.peaks_of(model, trainer, job, [BUFFERS] * 2)[0]
        took = json.loads((RESULTS / run).read_text())["memory_gb"]
        for phase in planned.trainer:
            free = took[f"{phase}_free"]
            device = {name: memory.H200_BYTES / memory.GB - free[other] for name, other in OPPOSITE.items()}
            for part, plan, of_run in (
                ("trainer", planned.trainer[phase], took[f"{phase}_allocated"]),
                ("device", planned.device[phase], device),
            ):
                found.append(
                    {"run": run, "recomputed": recomputed, "phase": phase, "part": part, "planned_gb": plan / memory.GB}
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
            f"{row['run']:26} {row['phase']:8} {row['part']:8} planned {row['planned_gb']:6.1f} GB, measured "
            f"{took['median']:6.1f} ({took['min']:.1f} to {took['max']:.1f}), {row['off']:+.0%}"
        )
    if chosen.output:
        chosen.output.write_text(json.dumps({"command": "benchmarks/memory_check.py", "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
