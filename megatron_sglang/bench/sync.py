"""`megatron-sglang bench sync`: the paths of a weight update side by side, in one run, on the same weights.

    stock     what Megatron-Bridge and SGLang ship, without any proof (`stock.py`)
    generic   `sync.method=generic`
    direct    `sync.method=auto`, where it applies

    torchrun --nproc-per-node 4 .venv/bin/megatron-sglang bench sync --hf-model MODEL --expert-model-parallel-size 4 \\
        --engine-tp 4 --syncs 20 --output sync.json

Every version has other weights. Each path publishes it in turn, and SGLang's own /weights_checker says what the engine
then holds: the same for both of ours, or there is no result. Where stock's weights differ (Bridge's merge mixes up
experts with SequentialMLP and EP > 1) the result says by how much. What the direct path moved is counted where it
leaves, and must be what the plan says, to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sglang import transfer
from megatron_sglang.config import LoraConfig, SyncConfig
from megatron_sglang.config_check import checked_lora
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.plan.shapes import hub_shapes
from megatron_sglang.weights.convert import SIZES
from megatron_sglang.weights.progress import is_leader

if TYPE_CHECKING:
    from megatron_sglang.bench.stock import Held
    from megatron_sglang.interfaces import Comm
    from megatron_sglang.sync import DirectPath
    from megatron_sglang.training.paths import Paths
    from megatron_sglang.types import SyncReport
    from megatron_sglang.weights.standalone import Model

PATHS = ("stock", "generic", "direct")
MAX_TOTAL_TOKENS = 4096
"""Hardly a token is sampled here, and an update empties the KV cache: 27 ms for one of a third of a CPU's memory."""


class BenchError(MegatronSglangError):
    """Two paths left different weights, or moved other bytes than planned: a number for it would mean nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True)
    sync = kinds.add_parser("sync", help="weight updates, path by path side by side")
    sync.add_argument("--hf-model", type=Path, required=True, help="folder of the model")
    sync.add_argument("--random-weights", action="store_true", help="config.json is enough")
    sync.add_argument("--engine-tp", type=int, default=1, help="ranks of the engine (1)")
    sync.add_argument("--engine-ep", type=int, default=1, help="expert parallelism inside the engine (1)")
    sync.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sync.add_argument("--lora-rank", type=int, default=32)
    sync.add_argument("--bucket-bytes", type=int, default=SyncConfig().bucket_bytes)
    also = "afterwards the direct path with these as well"
    sync.add_argument("--also-buckets", type=int, nargs="+", default=[], metavar="BYTES", help=also)
    buffers = (
        f"afterwards the direct path with so many send and receive buffers, too, instead of {transfer.BUFFERS} of each"
    )
    sync.add_argument("--also-buffers", type=int, nargs="+", default=[], metavar="N", help=buffers)
    sync.add_argument("--syncs", type=int, default=5, help="measured versions (5)")
    sync.add_argument("--warm-up", type=int, default=2, help="versions before them (2)")
    sync.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="which to measure (all)")
    sync.add_argument("--methods", metavar="A,B", help="measure these sync methods instead (bench/methods.py)")
    sync.add_argument("--lora-targets", metavar="A,B", help="with --methods: as lora.targets (its default)")
    memory = EngineOptions("").mem_fraction
    sync.add_argument("--mem-fraction", type=float, default=memory, help=f"as engine.mem_fraction ({memory})")
    sync.add_argument("--moe-grouped-gemm", action="store_true", help="as Megatron's: grouped experts, on GPUs")
    sync.add_argument("--profile", type=Path, help="text file: what one more direct update's time went to, on rank 0")
    sync.add_argument("--output", type=Path, help="JSON file with configuration, versions, phases, spread, memory")
    for name in SIZES:
        sync.add_argument(f"--{name}", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> None:
    """Run on every rank of torchrun, or alone; the leader prints and writes the result."""
    from megatron_sglang.bench import result
    from megatron_sglang.weights import standalone

    sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
    if args.moe_grouped_gemm:
        sizes["moe-grouped-gemm"] = True
    options = _engine_options(args)
    if args.methods:
        from megatron_sglang.bench import methods

        methods.run(args, options, sizes)
        return
    lora = checked_lora(LoraConfig(rank=args.lora_rank, alpha=2.0 * args.lora_rank))
    leads = is_leader()
    with contextlib.ExitStack() as stack:
        engine = create_engine(options) if leads else None
        if engine is not None:
            stack.callback(engine.close)
            engine.start()
            if options.resolved_device() == "cuda":
                # SGLang sizes its cache by the memory that is free before and after it loads, so nothing may grow then.
                engine.wait_ready()
        base = not args.random_weights
        model = stack.enter_context(standalone.adapted_model(args.hf_model, lora, args.dtype, sizes, base))
        if options.resolved_device() == "cpu":
            model.comm.from_leader(lambda: engine and engine.wait_ready())
        found: dict[str, Any] = {}
        for found in _measure(args, model, engine):
            if leads and args.output is not None:
                args.output.write_text(json.dumps(found, indent=2) + "\n")
    standalone.leave()
    if leads:
        print(result.table(found), file=sys.stderr)
        print(json.dumps(found, indent=2))


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    options = EngineOptions(
        model_path=str(args.hf_model),
        tp_size=args.engine_tp,
        ep_size=args.engine_ep,
        dtype=args.dtype,
        mem_fraction=args.mem_fraction,
        max_total_tokens=MAX_TOTAL_TOKENS,
    )
    if options.resolved_device() == "cpu":
        return options
    # No token is sampled here: nothing to compile or capture for.
    return replace(options, extra={"attention_backend": "triton", "disable_cuda_graph": True})


@dataclass(slots=True)
class Findings:
    """What the measured versions gave, by path."""

    reports: dict[str, list[SyncReport]] = field(default_factory=dict)
    device_peaks: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank allocated on its device at most, beyond what it had before the update."""
    checker_seconds: list[float] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    """Parameters in which stock's weights are not those of our paths."""
    parameters: int = 0
    """How many were compared, each on each rank."""


def _measure(args: argparse.Namespace, model: Model, engine: Any) -> Iterator[dict[str, Any]]:
    """The result, again with each further size of buckets: a run that is cut off keeps what it has measured."""
    import torch

    from megatron_sglang.bench import meter, result, stock
    from megatron_sglang.sync import publish
    from megatron_sglang.training import lora
    from megatron_sglang.training.paths import Paths

    comm, dtype = model.comm, getattr(torch, args.dtype)
    made = Paths(
        comm=comm,
        bridge=model.bridge,
        model_chunks=model.chunks,
        dtype=dtype,
        bucket_bytes=args.bucket_bytes,
        shapes=hub_shapes(args.hf_model),
        engine=engine,
        engine_ranks=args.engine_tp,
    )
    generic = made.generic()
    if args.paths != ["direct"]:
        publish(comm, engine, generic, 1)
    direct = made.direct()
    http = stock.connect(engine) if engine is not None else None
    stocks = stock.StockPath(comm, model.bridge, model.chunks, dtype, args.bucket_bytes, http, args.engine_tp)
    publishers: dict[str, Callable[[int], SyncReport]] = {
        "stock": stocks.publish,
        "generic": lambda version: publish(comm, engine, generic, version),
        "direct": lambda version: publish(comm, engine, direct, version),
    }
    pairs = _bytes_by_pair(direct)
    found, held = Findings({name: [] for name in args.paths}), []
    for number, version in enumerate(range(2, 2 + args.warm_up + args.syncs)):
        lora.vary(model.chunks, version)
        states: dict[str, Held] = {}
        for name in args.paths:
            with meter.counting() as traffic, meter.device_peak() as peak:
                report = publishers[name](version)
            if name == "direct":
                _check_traffic(comm, pairs, direct.exchanges, traffic)
            if number >= args.warm_up:
                found.reports[name].append(report)
                found.device_peaks[name] = max(found.device_peaks.get(name, 0), peak[0])
            if len(args.paths) > 1:
                answer = comm.from_leader(lambda: http and asdict(stock.held_by(http)))
                states[name] = stock.Held(**answer)
        _compare(version, states, found)
        held.append(_holdings(comm, engine))
        if comm.rank == 0:
            took = {name: sum(reports[-1].seconds.values()) for name, reports in found.reports.items() if reports}
            shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in took.items()) or "warming up"
            print(f"version {version}: {shown}", file=sys.stderr, flush=True)
    difference = stock.difference(stocks, model) if found.odd else None
    if args.profile is not None:
        with meter.profiled(args.profile if comm.rank == 0 else None):
            publishers["direct"](2 + args.warm_up + args.syncs)
    ranks = range(comm.world_size)
    moved = _by_host(pairs, comm.world_size)
    limit = meter.all_to_all_seconds(
        [[moved.get((source, target), 0) for target in ranks] for source in ranks],
        next(model.chunks[0].parameters()).device,
        args.syncs,
    )
    peaks = comm.gather(found.device_peaks)
    found.device_peaks = {name: max(one[name] for one in peaks) for name in args.paths}
    written = result.of(args, comm.world_size, found, difference, held, limit, moved)
    written |= {"buffers": made.buffers, "direct_with_buckets": {}, "direct_with_buffers": {}}
    yield written
    for count, size, path in _variants(args, made, direct, model):
        sizes = written["direct_with_buffers"].setdefault(count, {}) if count else written["direct_with_buckets"]
        sizes[size] = path
        yield written


def _variants(
    args: argparse.Namespace, made: Paths, direct: DirectPath, model: Model
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The direct path otherwise: buffers of each kind (0: as many as before), bytes of a bucket, result. Planned once
    for each size."""
    for size in (args.bucket_bytes, *args.also_buckets):
        path = direct if size == args.bucket_bytes else replace(made, bucket_bytes=size).direct()
        if path is not direct:
            yield 0, size, _repeated(args, made, path, model)
        sender: Any = path.sender
        for count in args.also_buffers:
            sender.buffers = count
            yield count, size, _repeated(args, made, path, model)


def _repeated(args: argparse.Namespace, made: Paths, path: DirectPath, model: Model) -> dict[str, Any]:
    """Warm-up and measured versions."""
    from megatron_sglang.bench import meter, result
    from megatron_sglang.sync import publish
    from megatron_sglang.training import lora

    reports, largest = [], 0
    for version in range(args.warm_up + args.syncs):
        lora.vary(model.chunks, version)
        with meter.device_peak() as peak:
            report = publish(made.comm, made.engine, path, version + 1)
        if version >= args.warm_up:
            reports.append(report)
            largest = max(largest, peak[0])
    return result.of_path(reports, max(made.comm.gather(largest)))


def _compare(version: int, states: Mapping[str, Held], found: Findings) -> None:
    """Raises `BenchError` if generic and direct path left different weights; notes where stock did."""
    found.checker_seconds += [state.seconds for state in states.values()]
    ours = [states[name] for name in ("generic", "direct") if name in states]
    if len(ours) == 2 and (odd := ours[0].differs_from(ours[1])):
        raise BenchError(
            f"version {version}: by SGLang's checksums {len(odd)} parameters differ after generic and direct path, "
            f"{odd[0]} first; report this"
        )
    if "stock" in states and ours:
        found.odd = sorted({*found.odd, *states["stock"].differs_from(ours[-1])})
        found.parameters = len(ours[-1].parameters)


def _by_host(pairs: Mapping[tuple[int, int], int], ranks: int) -> dict[tuple[int, int], int]:
    """Bytes by (trainer rank, trainer rank that hands them over)."""
    moved: dict[tuple[int, int], int] = {}
    for (source, target), size in pairs.items():
        pair = source, transfer.host_of(target, ranks)
        moved[pair] = moved.get(pair, 0) + size
    return moved


def _bytes_by_pair(direct: DirectPath) -> dict[tuple[int, int], int]:
    pieces = [piece for bucket in direct.sender.buckets for piece in bucket]
    return transfer.traffic(pieces, direct.sender.dtype.itemsize)


def _check_traffic(comm: Comm, pairs: Mapping[tuple[int, int], int], exchanges: int, traffic: Any) -> None:
    moved = _by_host(pairs, comm.world_size)
    planned = {target: size for (source, target), size in moved.items() if source == comm.rank and size}
    sent = {target: size for target, size in traffic.sent.items() if size}
    error = None
    if sent != planned or traffic.calls != exchanges:
        error = BenchError(
            f"rank {comm.rank} sent {sent} bytes by target in {traffic.calls} calls; the plan says {planned} in "
            f"{exchanges}"
        )
    comm.agree(error)


def _holdings(comm: Comm, engine: Any) -> dict[str, int]:
    """Summed over trainer ranks and the engine's processes; of device memory the fullest rank's: its tensors, their
    peak, and all that is not free, which the engine's process and open handles take part in."""
    import torch

    from megatron_sglang.bench import meter

    mine = asdict(meter.Holdings.of([os.getpid()]))
    mine["device_peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_initialized() else (0, 0)
    mine["device_used"] = total - free
    every = comm.gather(mine)
    pids = comm.from_leader(lambda: meter.tree(engine.server.pid))
    theirs = comm.from_leader(lambda: asdict(meter.Holdings.of(pids)))
    return {
        "trainer_resident": sum(one["resident"] for one in every),
        "trainer_descriptors": sum(one["descriptors"] for one in every),
        "trainer_device": max(one["device"] for one in every),
        "trainer_device_peak": max(one["device_peak"] for one in every),
        "device_used": max(one["device_used"] for one in every),
        "engine_resident": theirs["resident"],
        "engine_descriptors": theirs["descriptors"],
    }
