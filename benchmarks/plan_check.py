"""What `plan` predicts for weight updates that were measured: `python benchmarks/plan_check.py [--output FILE]`.

Plans the runs in benchmarks/results/sync_h200_N.json (2 and 4 GPUs) with each of their sizes of buckets, and sets the
predicted seconds beside the measured ones. Of 4 GPUs the figures in `plan/cost.py` know what its kernels and its bare
all_to_all took; hand-over and fixed are fitted to the run of 2, and this prints what they would be by it today. A run
of `OLDER` code cut its layers otherwise and passed over each delivery more often: what is predicted is not what it did.
Needs no GPU; some minutes, nearly all of it SGLang's loader.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.engine.options import EngineOptions  # noqa: E402
from megatron_sglang.placement import Placement  # noqa: E402
from megatron_sglang.plan import shapes as model_shapes  # noqa: E402
from megatron_sglang.plan.command import engine_slots  # noqa: E402
from megatron_sglang.plan.cost import host_for  # noqa: E402
from megatron_sglang.plan.trainer import Trainer  # noqa: E402
from megatron_sglang.plan.update import update_of  # noqa: E402
from megatron_sglang.transfer import SLOTS  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
GPUS = (2, 4)
OLDER = (4,)
"""Of them, those whose run was made before layers were cut across their owners and the engine's passes were joined."""
MODEL, ITEMSIZE = ROOT / "examples/qwen3_30b_a3b", 2


def rows_of(gpus: int) -> list[dict[str, Any]]:
    """One a size of buckets."""
    run = json.loads((RESULTS / f"sync_h200_{gpus}.json").read_text())[0]["result"]
    assert (run["ranks"], run["device"]) == (gpus, "NVIDIA H200"), run["command"]
    measured = {(run.get("slots", 2), run["bucket_bytes"]): run["paths"]["direct"]}
    measured |= {(run.get("slots", 2), int(size)): found for size, found in run["direct_with_buckets"].items()}
    for count, sizes in run.get("direct_with_slots", {}).items():
        measured |= {(int(count), int(size)): found for size, found in sizes.items()}
    shapes = model_shapes.hub_shapes(MODEL)
    shards = Trainer(shapes, model_shapes.heads(MODEL), Placement(world_size=gpus, ep=gpus)).shards()
    slots = engine_slots(EngineOptions(str(MODEL), tp_size=gpus, device="cpu"), shapes)
    rows = []
    for (buffers, size), found in measured.items():
        update = update_of(shards, slots, gpus, ITEMSIZE, size, host_for(gpus), buffers)
        seconds = found["seconds"]["total"]["median"]
        rows.append(
            {"gpus": gpus, "bucket_bytes": size, "slots": buffers, "of_older_code": gpus in OLDER}
            | {"measured_s": seconds, "predicted_s": update.seconds.total}
            | {"off": update.seconds.total / seconds - 1, "seconds": asdict(update.seconds)}
            | {"steps": asdict(update.steps), "load": asdict(max(update.loads, key=lambda load: load.received))}
            | {"measured_extra_bytes": found["extra_device_bytes"]}
            | {"planned_send_and_receive_bytes": max(memory.send + memory.receive for memory in update.memory)}
        )
        print(
            f"{gpus} GPUs, {buffers} x {size:>11,} bytes: {seconds:.3f} s, predicted {update.seconds.total:.3f} s",
            flush=True,
        )
    return rows


def fitted(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of handing over a bucket, and of what does not depend on their number: least squares over the rows."""
    parts = ("merge", "link", "network", "copy", "digest")
    left = [row["measured_s"] - sum(row["seconds"][part] for part in parts) for row in rows]
    return statistics.linear_regression([row["steps"]["buckets"] for row in rows], left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_check.json")
    chosen = parser.parse_args()
    rows = [row for gpus in GPUS for row in rows_of(gpus)]
    chosen.output.write_text(json.dumps(rows, indent=1) + "\n")
    hand_over, fixed = fitted([row for row in rows if (row["gpus"], row["slots"]) == (GPUS[0], SLOTS)])
    print(f"by the run of {GPUS[0]} GPUs, of older code: {GPUS[0] in OLDER}: {hand_over=:.6f}, {fixed=:.4f} s")


if __name__ == "__main__":
    main()
