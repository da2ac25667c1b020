"""The command: arguments in, figures out. The engine's layout comes from SGLang's own code in a child process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_sglang import layout, transfer
from megatron_sglang.config import SyncConfig
from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.engine.trace_offline import trace_ranks
from megatron_sglang.errors import ConfigError, WeightSyncError
from megatron_sglang.hf_files import ITEMSIZE
from megatron_sglang.placement import Placement
from megatron_sglang.plan import memory
from megatron_sglang.plan import shapes as model_shapes
from megatron_sglang.plan.cost import H200, figures, host_for
from megatron_sglang.plan.trainer import Trainer
from megatron_sglang.plan.update import Update, update_of

WIDEST_MATRIX = 16
"""Ranks up to which the bytes of each pair are printed; --json always has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Megatron's names for the trainer's sizes."""
    add = parser.add_argument
    add("hf_folder", type=Path, help="model in Hugging Face format; config.json is enough")
    add("--nproc", type=_positive, default=1, help="trainer ranks")
    add("--nproc-per-node", type=_positive, default=H200.gpus, help="of them on one machine (8), as torchrun's")
    for name in ("tensor-model", "pipeline-model", "expert-model", "context"):
        add(f"--{name}-parallel-size", type=_positive, default=1, help="as Megatron's")
    add("--engine-tp", type=_positive, help="ranks of the engine; default: as many as the trainer's")
    add("--engine-ep", type=_positive, default=1, help="expert parallelism inside the engine")
    add("--dtype", choices=sorted(ITEMSIZE), default="bfloat16", help="of the engine's parameters")
    add("--bucket-bytes", type=_positive, default=SyncConfig().bucket_bytes, help="as sync.bucket_bytes")
    add(
        "--buffers",
        type=_positive,
        default=transfer.BUFFERS,
        help=f"send buffers, receive buffers ({transfer.BUFFERS})",
    )
    add("--micro-batch-size", type=_positive, default=1, help="as Megatron's; for the memory of a train step")
    add("--sequence-tokens", type=_positive, default=memory.Job().sequence, help="longest prompt and completion (3072)")
    add("--lora-rank", type=_positive, default=memory.Job().lora_rank, help="as lora.rank (32)")
    add("--mem-fraction", type=float, default=memory.Job().mem_fraction, help="as sglang.mem_fraction_static (0.3)")
    add("--memory-saver", action="store_true", help="as sglang.enable_memory_saver")
    add("--recompute-num-layers", type=_counted, help="as Megatron's with --recompute-method block; default: all")
    add("--device-gb", type=float, default=memory.H200_BYTES / memory.GB, help="memory of a GPU, 10^9 bytes (150.1)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    placement = Placement(
        world_size=args.nproc,
        tp=args.tensor_model_parallel_size,
        cp=args.context_parallel_size,
        pp=args.pipeline_model_parallel_size,
        ep=args.expert_model_parallel_size,
    )
    engine_tp = args.engine_tp or args.nproc
    if args.bucket_bytes < ITEMSIZE[args.dtype]:
        raise ConfigError(f"--bucket-bytes={args.bucket_bytes} holds no element of {args.dtype}; give megabytes")
    options = EngineOptions(
        str(args.hf_folder), tp_size=engine_tp, ep_size=args.engine_ep, dtype=args.dtype, device="cpu"
    )
    shapes = model_shapes.hub_shapes(args.hf_folder)
    trainer = Trainer(shapes, model_shapes.heads(args.hf_folder), placement)
    shards = trainer.shards()
    print(f"{len(shapes):,} tensors; asking SGLang for the layout of {engine_tp} engine ranks", file=sys.stderr)
    slots = engine_slots(options, shapes)
    began = time.perf_counter()
    host = replace(host_for(min(args.nproc, args.nproc_per_node)), gpus=args.nproc_per_node)
    update = update_of(shards, slots, args.nproc, ITEMSIZE[args.dtype], args.bucket_bytes, host, args.buffers)
    print(f"planned in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    job = memory.Job(
        micro_batch=args.micro_batch_size,
        sequence=args.sequence_tokens,
        lora_rank=args.lora_rank,
        itemsize=ITEMSIZE[args.dtype],
        experts_per_token=model_shapes.experts_per_token(args.hf_folder),
        mem_fraction=args.mem_fraction,
        releases=args.memory_saver,
        recomputed=args.recompute_num_layers,
        device_bytes=int(args.device_gb * memory.GB),
    )
    peaks = memory.peaks_of(shapes, trainer, job, [one.total for one in update.memory])
    if args.json:
        print(json.dumps(as_json(placement, update) | {"memory": memory.as_json(peaks, job)}, indent=1))
    else:
        text = [*as_text(placement, update), "", "# peak memory of the fullest rank", *memory.as_text(peaks, job)]
        print("\n".join(text))


def engine_slots(options: EngineOptions, shapes: model_shapes.Shapes) -> list[transfer.Region]:
    """What every engine rank takes. Raises `WeightSyncError` where the direct path would not apply."""
    layouts = trace_ranks(options, shapes)
    if reasons := layout.problems(layouts, shapes):
        raise WeightSyncError(f"the generic path would be used, which this plan is not for: {'; '.join(reasons[:3])}")
    return [slot for found in layouts for slot in transfer.slots_of(found, shapes)]


def as_json(placement: Placement, update: Update) -> dict[str, Any]:
    """Bytes and seconds."""
    ranks = range(placement.world_size)
    return {
        "ranks": [asdict(placement.of(rank)) for rank in ranks],
        "engine_ranks": update.engine_ranks,
        "tensors": update.tensors,
        "pieces": update.pieces,
        "bytes": update.total,
        "bytes_on_device": update.stays,
        "bytes_between_devices": update.total - update.stays,
        "bytes_between_machines": update.far,
        "pairs": [
            {"trainer_rank": source, "engine_rank": target, "bytes": size}
            for (source, target), size in sorted(update.pairs.items())
        ],
        "buckets": update.buckets,
        "largest_bucket_bytes": update.largest,
        "largest_bucket_bytes_of_a_rank": update.largest_of_rank,
        "peak_extra_bytes": [asdict(extra) | {"total": extra.total} for extra in update.memory],
        "seconds": asdict(update.seconds) | {"total": update.seconds.total},
        "host": update.host.name,
        "figures": {name: asdict(figure) for name, figure in figures(update.host).items()},
    }


def as_text(placement: Placement, update: Update) -> Iterator[str]:
    """Lines for people."""
    yield from ("# ranks of the trainer", placement.table(), "")
    yield "# bytes from trainer rank (row) to engine rank (column), in MB"
    yield from _matrix(placement.world_size, update)
    total = update.total or 1
    yield f"{update.tensors:,} tensors, {_mb(update.total)} MB in {update.pieces:,} rectangles"
    yield f"stays on its device: {_mb(update.stays)} MB ({update.stays / total:.0%})"
    yield f"must cross: {_mb(update.total - update.stays)} MB, at most {_mb(_busiest(update))} MB out of one rank"
    if update.far:
        most = max(load.sent_far for load in update.loads)
        yield f"must leave its machine: {_mb(update.far)} MB of it, at most {_mb(most)} MB out of one rank"
    yield from ("", "# buckets")
    yield (
        f"{update.buckets} buckets; the largest has {_mb(update.largest)} MB, "
        f"at most {_mb(update.largest_of_rank)} MB for one engine rank"
    )
    rank = max(range(placement.world_size), key=lambda rank: update.memory[rank].total)
    extra = update.memory[rank]
    yield from ("", "# peak extra memory")
    yield (
        f"rank {rank}: {_mb(extra.total)} MB = send buffers {_mb(extra.send)} + receive buffers {_mb(extra.receive)}"
    )
    yield from ("", f"# predicted seconds of one update on {update.host.name}")
    for name, figure in figures(update.host).items():
        seconds, rate = getattr(update.seconds, name), _rate(name, figure.value)
        yield f"{name:9}  {seconds:6.3f}  {rate:>9}  {figure.kind}"
    yield f"{'total':9}  {update.seconds.total:6.3f}"
    yield "merge and link: of each bucket's busiest rank; of link and to_itself the longer counts"
    yield "what each figure was taken from: --json, docs/plan.md"


def _matrix(ranks: int, update: Update) -> Iterator[str]:
    if ranks > WIDEST_MATRIX:
        yield f"{ranks} ranks: see --json"
        return
    rows: list[Sequence[str]] = [["", *map(str, range(update.engine_ranks))]]
    for source in range(ranks):
        sizes = (update.pairs.get((source, target), 0) for target in range(update.engine_ranks))
        rows.append([str(source), *(_mb(size) for size in sizes)])
    width = max(len(text) for row in rows for text in row)
    yield from ("  ".join(text.rjust(width) for text in row) for row in rows)


def _busiest(update: Update) -> int:
    return max(load.sent + load.sent_far for load in update.loads)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _rate(name: str, value: float) -> str:
    return f"{value * 1e3:.1f} ms" if name in ("hand_over", "fixed") else f"{value / 1e9:.0f} GB/s"


def _positive(text: str, least: int = 1) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
    return value


def _counted(text: str) -> int:
    return _positive(text, least=0)
