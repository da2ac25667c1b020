"""`--dry-run`: the resolved configuration, who sits where, and what a weight update will send. Starts nothing."""

from __future__ import annotations

import math
import os

from megatron_sglang import buckets, config_load
from megatron_sglang.config import RunConfig
from megatron_sglang.config_sizes import PARALLEL, check_micro_batches, packed_tokens, parallel_size
from megatron_sglang.hf_files import ITEMSIZE, tensor_shapes
from megatron_sglang.placement import Placement, engines


def describe(config: RunConfig) -> str:
    """Raises `ConfigError` for sizes that do not divide the ranks that torchrun started (1 without torchrun)."""
    tp, cp, pp, ep = (parallel_size(config, kind) for kind in PARALLEL)
    placement = Placement(world_size=int(os.environ.get("WORLD_SIZE", "1")), tp=tp, cp=cp, pp=pp, ep=ep)
    check_micro_batches(config, placement.dp)
    parts = ["# configuration", config_load.dump(config), "# ranks", placement.table(), "", "# engines"]
    return "\n".join([*parts, engine_table(config), "", "# weight update", bucket_plan(config)])


def engine_table(config: RunConfig) -> str:
    """One line for each engine: the trainer ranks beside it, its address, or how many ranks it has of its own."""
    if config.engine.external:
        return "\n".join(f"engine {number}: {url}" for number, url in enumerate(config.engine.external))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tp_size = config.engine.tp_size or local
    if config.rollout.mode == "split":
        return f"engines of {tp_size} ranks on the devices that do not train"
    lines = (
        f"engine {number}: beside trainer ranks {', '.join(map(str, ranks))}"
        for number, ranks in enumerate(engines(local, tp_size))
    )
    return "\n".join(lines)


def bucket_plan(config: RunConfig) -> str:
    """What each bucket of the generic path holds, from the headers of the model's safetensors files; without them, the
    command that reckons the direct path's from config.json, which takes a minute."""
    if not (shapes := tensor_shapes(config.model.hf_path)):
        return f"no weights in {config.model.hf_path}; by its config.json an update moves:\n    {plan_command(config)}"
    itemsize = ITEMSIZE[config.model.dtype]
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    plan = buckets.plan(sizes, config.sync.bucket_bytes)
    lines = []
    for index, names in enumerate(plan):
        size = sum(sizes[name] for name in names)
        lines.append(f"bucket {index}: {size:,} bytes, {len(names)} tensors, {names[0]} ... {names[-1]}")
    total = f"{len(sizes)} tensors, {sum(sizes.values()):,} bytes in {config.model.dtype}, {len(plan)} buckets"
    return "\n".join([*lines, total])


def plan_command(config: RunConfig) -> str:
    """`megatron-sglang plan` of this run's sizes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    words = [
        f"megatron-sglang plan {config.model.hf_path} --nproc {ranks} --engine-tp {config.engine.tp_size or ranks}"
    ]
    for name in PARALLEL:
        if (size := parallel_size(config, name)) > 1:
            words.append(f"--{name}-parallel-size {size}")
    if (ep_size := config.sglang.get("ep_size", 1)) > 1:
        words.append(f"--engine-ep {ep_size}")
    words.append(f"--dtype {config.model.dtype} --bucket-bytes {config.sync.bucket_bytes}")
    words.append(f"--micro-batch-size {config.megatron.get('micro-batch-size', 1)} --lora-rank {config.lora.rank}")
    words.append(f"--sequence-tokens {packed_tokens(config) or config.longest_sample}")
    if config.megatron.get("recompute-granularity") != "full":
        words.append("--recompute-num-layers 0")
    elif config.megatron.get("recompute-method") == "block":
        words.append(f"--recompute-num-layers {config.megatron['recompute-num-layers']}")
    if "mem_fraction_static" in config.sglang:
        words.append(f"--mem-fraction {config.sglang['mem_fraction_static']}")
    return " ".join([*words, *(["--memory-saver"] if config.sglang.get("enable_memory_saver") else [])])
