"""`--dry-run`: the resolved configuration, who sits where, and what a weight update will send. Starts nothing."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open

from megatron_sglang import buckets, config_load
from megatron_sglang.config import RunConfig
from megatron_sglang.placement import Placement, engines

_BYTES = {"float32": 4, "bfloat16": 2}


def describe(config: RunConfig) -> str:
    """Raises `ConfigError` for sizes that do not divide the ranks that torchrun started (1 without torchrun)."""

    def size(flag: str) -> int:
        return int(config.megatron.get(f"{flag}-parallel-size", 1))

    placement = Placement(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        tp=size("tensor-model"),
        cp=size("context"),
        pp=size("pipeline-model"),
        ep=size("expert-model"),
    )
    parts = ["# configuration", config_load.dump(config), "# ranks", placement.table(), "", "# engines"]
    return "\n".join([*parts, engine_table(config), "", "# weight update", bucket_plan(config)])


def engine_table(config: RunConfig) -> str:
    """One line for each engine: the trainer ranks beside it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = engines(local, config.engine.tp_size or local)
    lines = (
        f"engine {number}: beside trainer ranks {', '.join(map(str, ranks))}" for number, ranks in enumerate(found)
    )
    return "\n".join(lines)


def bucket_plan(config: RunConfig) -> str:
    """What each bucket of the generic path holds, from the headers of the model's safetensors files."""
    itemsize = _BYTES[config.model.dtype]
    sizes: dict[str, int] = {}
    for path in sorted(Path(config.model.hf_path).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                elements = 1
                for extent in file.get_slice(name).get_shape():
                    elements *= extent
                sizes[name] = elements * itemsize
    plan = buckets.plan(sizes, config.sync.bucket_bytes)
    lines = []
    for index, names in enumerate(plan):
        size = sum(sizes[name] for name in names)
        lines.append(f"bucket {index}: {size:,} bytes, {len(names)} tensors, {names[0]} ... {names[-1]}")
    total = f"{len(sizes)} tensors, {sum(sizes.values()):,} bytes in {config.model.dtype}, {len(plan)} buckets"
    return "\n".join([*lines, total])
