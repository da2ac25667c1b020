"""The predicted time of a weight update up to 1,024 GPUs: a table as JSON, and docs/figures/plan_curve.png.

    python benchmarks/plan_curve.py MODEL_FOLDER [--output benchmarks/results/plan_curve.json]

Engines of TP 8, one for each machine of 8 GPUs. With EP 8 every machine holds a whole model and nothing leaves it; with
more, an engine's experts come from other machines. Ranks beyond one expert-parallel group are replicas of it that
serve their own engines, so one group is planned. All layers of the model are alike: one is planned and counted so
often as there are. What grows with the number of ranks but not with bytes (latencies of collectives) is not in the
model, and the product has one engine so far.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang import transfer  # noqa: E402
from megatron_sglang.engine.options import EngineOptions  # noqa: E402
from megatron_sglang.placement import Placement  # noqa: E402
from megatron_sglang.plan import shapes as model_shapes  # noqa: E402
from megatron_sglang.plan.command import engine_slots  # noqa: E402
from megatron_sglang.plan.cost import H200, Figure, Host, predict  # noqa: E402
from megatron_sglang.plan.trainer import Trainer  # noqa: E402
from megatron_sglang.plan.update import loads_of, steps_of, update_of  # noqa: E402

ITEMSIZE, BUCKET_BYTES = 2, 480_000_000
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = (25e9, 50e9, 100e9)
"""Bytes a second of each GPU to other machines: adapters of 200, 400 and 800 Gb/s."""


def planned_group(
    shapes: model_shapes.Shapes, heads: tuple[int, int], slots: list[transfer.Region], ep: int
) -> Counter[tuple[int, int]]:
    """Bytes by (source, target) of one expert-parallel group of `ep` ranks."""
    layers = {int(found[1]) for name in shapes if (found := re.search(r"\.layers\.(\d+)\.", name))}
    pairs = Counter[tuple[int, int]]()
    for pattern, times in ((r"(?!.*\.layers\.)", 1), (r".*\.layers\.0\.", len(layers))):
        some = {name: shape for name, shape in shapes.items() if re.match(pattern, name)}
        shards = Trainer(some, heads, Placement(world_size=ep, ep=ep if times > 1 else 1)).shards()
        wanted = [
            replace(slot, rank=slot.rank + first)
            for first in range(0, ep, H200.gpus)
            for slot in slots
            if slot.name in some
        ]
        pieces = transfer.make_plan(shards, wanted, machines=[rank // H200.gpus for rank in range(ep)])
        for pair, size in transfer.traffic(pieces, ITEMSIZE).items():
            pairs[pair] += size * times
    return pairs


def curve(folder: Path) -> dict[str, Any]:
    shapes, heads = model_shapes.hub_shapes(folder), model_shapes.heads(folder)
    slots = engine_slots(EngineOptions(str(folder), tp_size=H200.gpus, device="cpu"), shapes)
    experts = 1 + max(int(found[1]) for name in shapes if (found := re.search(r"\.experts\.(\d+)\.", name)))
    whole = update_of(
        Trainer(shapes, heads, Placement(world_size=8, ep=8)).shards(), slots, H200.gpus, ITEMSIZE, BUCKET_BYTES
    )
    rows, groups = [], {}
    for gpus in GPUS:
        for widest in (H200.gpus, experts):
            ep = min(gpus, widest)
            if ep not in groups:
                groups[ep] = planned_group(shapes, heads, slots, ep)
                print(f"EP {ep} planned", flush=True)
            loads = loads_of(groups[ep], ep, H200.gpus)
            # Every bucket is supposed to keep all ranks as busy as the whole update does.
            steps = replace(steps_of([groups[ep]], ep, H200.gpus), buckets=whole.buckets)
            for network in NETWORKS:
                host: Host = replace(H200, network=Figure(network, "assumed", ""))
                seconds = predict(loads, steps, host)
                rows.append(
                    {"gpus": gpus, "ep": ep, "widest_ep": widest, "network": network}
                    | {"leaves_machine": max(load.sent_far for load in loads)}
                    | {"seconds": asdict(seconds) | {"total": seconds.total}}
                )
    return {"rows": rows, "whole_plan": asdict(whole.seconds) | {"total": whole.seconds.total}}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), constrained_layout=True)
    lines = [(8, 50e9, "EP 8: each machine holds the model")]
    widest = max(row["widest_ep"] for row in rows)
    lines += [(widest, rate, f"EP over machines, {rate / 1e9:.0f} GB/s a GPU between them") for rate in NETWORKS]
    for ep, rate, label in lines:
        some = [row for row in rows if (row["widest_ep"], row["network"]) == (ep, rate)]
        style = "--" if ep == H200.gpus else "-"
        gpus, seconds = [row["gpus"] for row in some], [row["seconds"]["total"] for row in some]
        axes.plot(gpus, seconds, style, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs (machines of 8, an engine of TP 8 in each)")
    axes.set_ylabel("predicted seconds of an update")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/plan_curve.json")
    chosen = parser.parse_args()
    found = curve(chosen.model)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    draw(found["rows"], ROOT / "docs/figures/plan_curve.png")


if __name__ == "__main__":
    main()
