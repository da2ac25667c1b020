"""`megatron-sglang bench sync`: the paths of a weight update side by side, in one run, on the same weights.

    torchrun --nproc-per-node 4 .venv/bin/megatron-sglang bench sync --hf-model MODEL --expert-model-parallel-size 4 \\
        --engine-tp 4 --syncs 20 --output sync.json

Every version has other weights. Each path publishes it in turn, and the engine must then hold the same bits. What the
direct path moved is counted where it leaves, and must be what the plan says, to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sglang import transfer
from megatron_sglang.config import LoraConfig, SyncConfig
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.plan.shapes import hub_shapes
from megatron_sglang.weights.convert import SIZES
from megatron_sglang.weights.progress import is_leader

if TYPE_CHECKING:
    from megatron_sglang.interfaces import Comm
    from megatron_sglang.sync import DirectPath
    from megatron_sglang.sync import Path as SyncPath
    from megatron_sglang.types import SyncReport
    from megatron_sglang.weights.standalone import Model

PACKAGES = ("torch", "sglang", "megatron-core", "megatron-bridge")


class BenchError(MegatronSglangError):
    """Two paths left different weights, or moved other bytes than planned: a number for it would mean nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True)
    sync = kinds.add_parser("sync", help="weight updates, generic and direct path side by side")
    sync.add_argument("--hf-model", type=Path, required=True, help="folder of the model")
    sync.add_argument("--random-weights", action="store_true", help="config.json is enough")
    sync.add_argument("--engine-tp", type=int, default=1, help="ranks of the engine (1)")
    sync.add_argument("--engine-ep", type=int, default=1, help="expert parallelism inside the engine (1)")
    sync.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sync.add_argument("--lora-rank", type=int, default=32)
    sync.add_argument("--bucket-bytes", type=int, default=SyncConfig.bucket_bytes)
    sync.add_argument("--syncs", type=int, default=5, help="measured versions (5)")
    sync.add_argument("--warm-up", type=int, default=2, help="versions before them (2)")
    sync.add_argument("--paths", choices=("both", "direct"), default="both")
    sync.add_argument("--output", type=Path, help="JSON file with configuration, versions, phases, spread, memory")
    for name in SIZES:
        sync.add_argument(f"--{name}", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> None:
    """Run on every rank of torchrun, or alone; the leader prints and writes the result."""
    from megatron_sglang.weights import standalone

    sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
    options = EngineOptions(
        model_path=str(args.hf_model), tp_size=args.engine_tp, ep_size=args.engine_ep, dtype=args.dtype
    )
    leads = is_leader()
    with contextlib.ExitStack() as stack:
        engine = create_engine(options) if leads else None
        if engine is not None:
            stack.callback(engine.close)
            engine.start()
        lora = LoraConfig(rank=args.lora_rank, alpha=2.0 * args.lora_rank)
        base = not args.random_weights
        model = stack.enter_context(standalone.adapted_model(args.hf_model, lora, args.dtype, sizes, base))
        model.comm.from_leader(lambda: engine and engine.wait_ready())
        result = _measure(args, model, engine)
    standalone.leave()
    if leads:
        text = json.dumps(result, indent=2)
        if args.output is not None:
            args.output.write_text(text + "\n")
        print(_table(result), file=sys.stderr)
        print(text)


def _measure(args: argparse.Namespace, model: Model, engine: Any) -> dict[str, Any]:
    import torch

    from megatron_sglang.bench import meter
    from megatron_sglang.sync import publish
    from megatron_sglang.training.paths import Paths

    shapes = hub_shapes(args.hf_model)
    made = Paths(
        comm=model.comm,
        bridge=model.bridge,
        model_chunks=model.chunks,
        dtype=getattr(torch, args.dtype),
        bucket_bytes=args.bucket_bytes,
        shapes=shapes,
        engine=engine,
        engine_ranks=args.engine_tp,
    )
    generic = made.generic()
    publish(model.comm, engine, generic, 1)
    direct = made.direct()
    paths: list[SyncPath] = [generic, direct] if args.paths == "both" else [direct]
    pairs = _bytes_by_pair(direct)
    reports: dict[str, list[SyncReport]] = {path.name: [] for path in paths}
    held: list[dict[str, int]] = []
    for number, version in enumerate(range(2, 2 + args.warm_up + args.syncs)):
        _change_adapters(model.chunks, version)
        digests = set()
        for path in paths:
            with meter.counting() as traffic:
                report = publish(model.comm, engine, path, version)
            digests.add(report.engine_digest)
            if path is direct:
                _check_traffic(model.comm, pairs, len(direct.sender.buckets), traffic)
            if number >= args.warm_up:
                reports[path.name].append(report)
        if len(digests) != 1:
            raise BenchError(f"version {version}: the paths left different weights, {sorted(digests)}; report this")
        held.append(_holdings(model.comm, engine))
    ranks = range(model.comm.world_size)
    limit = meter.all_to_all_seconds(
        [[pairs.get((source, target), 0) for target in ranks] for source in ranks],
        next(model.chunks[0].parameters()).device,
        args.syncs,
    )
    return _result(args, model.comm, reports, held, limit, pairs)


def _bytes_by_pair(direct: DirectPath) -> dict[tuple[int, int], int]:
    pieces = [piece for bucket in direct.sender.buckets for piece in bucket]
    return transfer.traffic(pieces, direct.sender.dtype.itemsize)


def _check_traffic(comm: Comm, pairs: Mapping[tuple[int, int], int], buckets: int, traffic: Any) -> None:
    planned = {target: size for (source, target), size in pairs.items() if source == comm.rank and size}
    sent = {target: size for target, size in traffic.sent.items() if size}
    error = None
    if sent != planned or traffic.calls != buckets:
        error = BenchError(
            f"rank {comm.rank} sent {sent} bytes by target in {traffic.calls} calls; the plan says {planned} in "
            f"{buckets}"
        )
    comm.agree(error)


def _change_adapters(chunks: list[Any], version: int) -> None:
    """Other values in each version, the same on all ranks that hold copies of a weight: names decide, not ranks."""
    import zlib

    import torch

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name:
                seed = zlib.crc32(f"{version} {name}".encode())
                generator = torch.Generator(device=parameter.device).manual_seed(seed)
                values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.data.copy_(values * 0.02)


def _holdings(comm: Comm, engine: Any) -> dict[str, int]:
    """Summed over trainer ranks and the engine's processes; the largest trainer rank's peak of device memory."""
    import torch

    from megatron_sglang.bench import meter

    mine = asdict(meter.Holdings.of([os.getpid()]))
    mine["device_peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    every = comm.gather(mine)
    pids = comm.from_leader(lambda: meter.tree(engine.server.pid))
    theirs = comm.from_leader(lambda: asdict(meter.Holdings.of(pids)))
    return {
        "trainer_resident": sum(one["resident"] for one in every),
        "trainer_descriptors": sum(one["descriptors"] for one in every),
        "trainer_device": max(one["device"] for one in every),
        "trainer_device_peak": max(one["device_peak"] for one in every),
        "engine_resident": theirs["resident"],
        "engine_descriptors": theirs["descriptors"],
    }


def _result(
    args: argparse.Namespace,
    comm: Comm,
    reports: Mapping[str, list[SyncReport]],
    held: list[dict[str, int]],
    limit: float,
    pairs: Mapping[tuple[int, int], int],
) -> dict[str, Any]:
    from megatron_sglang.bench import meter

    found = {name: _of_path(of_path) for name, of_path in reports.items()}
    measured = held[args.warm_up :]
    return {
        "command": "megatron-sglang " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "device": _device(),
        "ranks": comm.world_size,
        "warm_up": args.warm_up,
        "syncs": args.syncs,
        "paths": found,
        "generic_over_direct": (
            found["generic"]["seconds"]["total"]["median"] / found["direct"]["seconds"]["total"]["median"]
            if len(found) == 2
            else None
        ),
        "all_to_all_limit_s": limit,
        "direct_over_limit": found["direct"]["seconds"]["total"]["median"] / limit if limit else None,
        "planned_bytes": sum(pairs.values()),
        "crossing_bytes": sum(size for (source, target), size in pairs.items() if source != target),
        "bytes_moved_as_planned": True,
        "p99_over_median": {
            name: value["seconds"]["total"]["p99"] / value["seconds"]["total"]["median"]
            for name, value in found.items()
        },
        "held": {name: meter.spread([one[name] for one in measured]) for name in measured[0]},
        "held_first_and_last": [measured[0], measured[-1]],
    }


def _of_path(reports: list[SyncReport]) -> dict[str, Any]:
    from megatron_sglang.bench import meter

    phases = {name: meter.spread([report.seconds[name] for report in reports]) for name in reports[0].seconds}
    total = meter.spread([sum(report.seconds.values()) for report in reports])
    last = reports[-1]
    return {
        "seconds": {"total": total, **phases},
        "buckets": last.buckets,
        "bytes": last.bytes,
        "cast_loss": last.fidelity.cast_loss,
        "update_norm": last.fidelity.update_norm,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _device() -> str:
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def _table(result: Mapping[str, Any]) -> str:
    lines = [f"{'path':8} {'buckets':>8} {'MB':>10} {'min s':>8} {'median':>8} {'p99':>8} {'max':>8}"]
    for name, found in result["paths"].items():
        total = found["seconds"]["total"]
        numbers = " ".join(f"{total[key]:8.3f}" for key in ("min", "median", "p99", "max"))
        lines.append(f"{name:8} {found['buckets']:8} {found['bytes'] / 1e6:10.1f} {numbers}")
    lines.append(f"all_to_all alone {result['all_to_all_limit_s']:.4f} s; bytes and calls as planned")
    return "\n".join(lines)
