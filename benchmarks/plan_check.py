"""What `plan` predicts for weight updates that were measured: `python benchmarks/plan_check.py [--output FILE]`.

Plans the runs of the 30B model in benchmarks/results/sync_h200_N.json (1, 2 and 4 GPUs) with each of their sizes of
buckets, and sets the predicted seconds beside the measured ones. Of 4 GPUs the figures in `plan/cost.py` know what its
kernels and its bare all_to_all took; the hand-over is what the present code's run of 2 leaves, and this prints what it
would be by it today. What is predicted is not what older code did (three messages, slower kernels; on 4 GPUs also more
passes over each delivery). Needs no GPU; some minutes, nearly all of it SGLang's loader.
"""

from __future__ import annotations

import argparse
import json
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
from megatron_sglang.plan.cost import FIXED_S, host_for  # noqa: E402
from megatron_sglang.plan.trainer import Trainer  # noqa: E402
from megatron_sglang.plan.update import update_of  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
GPUS = (1, 2, 4)
OF_TODAY = 2
"""GPUs, the most that today's code has run on."""
RUN, OLDER, MERGED_OTHERWISE = "30b-", "older code", "before the merging kernel"
"""What the name of such a run begins with, what it holds where the code has changed since, and where it has changed so
much that the figures say nothing of it."""
MODEL, ITEMSIZE = ROOT / "examples/qwen3_30b_a3b", 2


def rows_of(gpus: int) -> list[dict[str, Any]]:
    """One a size of buckets, of each run."""
    shapes = model_shapes.hub_shapes(MODEL)
    shards = Trainer(shapes, model_shapes.heads(MODEL), Placement(world_size=gpus, ep=gpus)).shards()
    slots = engine_slots(EngineOptions(str(MODEL), tp_size=gpus, device="cpu"), shapes)
    rows = []
    for run in json.loads((RESULTS / f"sync_h200_{gpus}.json").read_text()):
        if not run["step"].startswith(RUN) or MERGED_OTHERWISE in run["step"]:
            continue
        for (buffers, size), found in measured(run["result"], gpus).items():
            update = update_of(shards, slots, gpus, ITEMSIZE, size, host_for(gpus), buffers)
            seconds = found["seconds"]["total"]["median"]
            rows.append(
                {"gpus": gpus, "run": run["step"], "bucket_bytes": size, "buffers": buffers}
                | {"of_older_code": gpus > OF_TODAY or OLDER in run["step"]}
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


def measured(run: dict[str, Any], gpus: int) -> dict[tuple[int, int], dict[str, Any]]:
    """The direct path's results by (buffers of each kind, bytes of a bucket)."""
    assert (run["ranks"], run["device"]) == (gpus, "NVIDIA H200"), run["command"]
    found = {(run.get("buffers", 2), run["bucket_bytes"]): run["paths"]["direct"]}
    found |= {(run.get("buffers", 2), int(size)): one for size, one in run["direct_with_buckets"].items()}
    for count, sizes in run.get("direct_with_buffers", {}).items():
        found |= {(int(count), int(size)): one for size, one in sizes.items()}
    return found


def hand_over_of(row: dict[str, Any]) -> float:
    """Seconds of a bucket: what the figures of the bytes and `FIXED_S` leave of the measured ones."""
    seconds = row["seconds"]
    exchange = max(seconds["link"], seconds["to_itself"])
    left = (
        row["measured_s"] - FIXED_S - exchange - sum(seconds[part] for part in ("merge", "network", "copy", "digest"))
    )
    return left / row["steps"]["buckets"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_check.json")
    chosen = parser.parse_args()
    rows = [row for gpus in GPUS for row in rows_of(gpus)]
    chosen.output.write_text(json.dumps(rows, indent=1) + "\n")
    for row in (row for row in rows if not row["of_older_code"]):
        print(f"by {row['run']}, {row['gpus']} GPUs: hand-over {hand_over_of(row):.6f} s, predicted {row['off']:+.1%}")


if __name__ == "__main__":
    main()
