"""`megatron-sglang bench sync --methods ...`: the sync methods against each other, on the same weights.

    torchrun --nproc-per-node 2 .venv/bin/megatron-sglang bench sync --hf-model MODEL --engine-tp 2 --dtype float32 \\
        --methods direct,generic,disk,merge-on-engine,restart,adapter --lora-targets linear_qkv,linear_proj

Each method publishes the same versions. Those that leave merged weights must leave the same engine digest, version by
version; those of `adapter` (on a GPU of `merge-on-engine` too) must sample the same tokens with the same logprobs, or
there is no result. Besides bytes and seconds: what a repeated prompt finds in the prefix cache, which is on here,
before and after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sglang.config import LoraConfig
from megatron_sglang.config_check import checked_lora, split_targets
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.engine.lora_options import lora_server_args
from megatron_sglang.errors import ConfigError, MegatronSglangError
from megatron_sglang.plan.shapes import hub_shapes
from megatron_sglang.weights.progress import is_leader

if TYPE_CHECKING:
    from megatron_sglang.types import SyncReport
    from megatron_sglang.weights.standalone import Model

METHODS = ("direct", "generic", "disk", "merge-on-engine", "restart", "adapter")
PROBE = tuple(range(5, 69))
"""A prompt of 64 tokens."""
GAP = {"cpu": {"float32": 1e-4, "bfloat16": 0.25}, "cuda": {"float32": 5e-2, "bfloat16": 0.25}}
"""Largest difference between a logprob under an adapter and under merged weights. On a GPU SGLang's kernels multiply
fp32 as TF32, of 10 bits: what differs in the last bit before may differ in the tenth after, and send a token to another
expert. Adapters that are not applied differ by what the result calls `effect`."""
ROUNDED = {"cpu": {"adapter"}, "cuda": {"adapter", "merge-on-engine"}}
"""Methods whose weights need not have the same bits as those merged by the trainer: they are judged by what is sampled.
On a GPU an engine rank sums products in another order than the trainer's kernel."""


class MethodsError(MegatronSglangError):
    """Two methods left different weights: a number for either would mean nothing."""


def chosen(text: str) -> list[str]:
    """In the order in which they are measured; `ConfigError` for an unknown one."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(METHODS)):
        raise ConfigError(f"--methods names {', '.join(unknown)}; expected some of {','.join(METHODS)}")
    return [name for name in METHODS if name in names]


def run(args: argparse.Namespace, options: EngineOptions, sizes: Mapping[str, int]) -> None:
    """Run on every rank of torchrun, or alone; the leader prints and writes the result."""
    from megatron_sglang.weights import standalone

    methods = chosen(args.methods)
    targets = LoraConfig().targets if args.lora_targets is None else split_targets([args.lora_targets])
    lora = checked_lora(LoraConfig(rank=args.lora_rank, alpha=2.0 * args.lora_rank, targets=targets))
    device = options.resolved_device()
    extra = {**options.extra, "disable_radix_cache": False}
    merged = dataclasses.replace(options, extra=extra)
    plain = lora_server_args(lora, options.model_path, device, {}) if "adapter" in methods else {}
    serving = dataclasses.replace(options, extra=extra | plain, load_format="dummy" if args.random_weights else "auto")
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory()) if is_leader() else ""
        base = not args.random_weights
        model = stack.enter_context(standalone.adapted_model(args.hf_model, lora, args.dtype, sizes, base))
        home = model.comm.from_leader(lambda: home)
        for group, how in ((METHODS[:-1], merged), (METHODS[-1:], serving)):
            if names := [name for name in methods if name in group]:
                with _engine(model, how) as engine:
                    found |= {name: _measured(args, model, engine, lora, home, name) for name in names}
        _compare(found, GAP[device][args.dtype], ROUNDED[device])
        ranks = model.comm.world_size
    standalone.leave()
    if is_leader():
        result = _result(args, lora, ranks, found, ROUNDED[device])
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=2) + "\n")
        print(_table(result), file=sys.stderr)
        print(json.dumps(result, indent=2))


@contextlib.contextmanager
def _engine(model: Model, options: EngineOptions) -> Iterator[Any]:
    """On the leader; None elsewhere."""
    with contextlib.ExitStack() as stack:
        engine = create_engine(options) if model.comm.rank == 0 else None
        if engine is not None:
            stack.callback(engine.close)
            engine.start()
        model.comm.from_leader(lambda: engine and engine.wait_ready())
        yield engine


def _measured(
    args: argparse.Namespace, model: Model, engine: Any, lora: LoraConfig, home: str, name: str
) -> dict[str, Any]:
    """One method, all versions."""
    import torch

    from megatron_sglang.sync import publish
    from megatron_sglang.training.lora import vary
    from megatron_sglang.training.paths import Paths

    paths = Paths(
        comm=model.comm,
        bridge=model.bridge,
        model_chunks=model.chunks,
        dtype=getattr(torch, args.dtype),
        bucket_bytes=args.bucket_bytes,
        shapes=hub_shapes(args.hf_model),
        engine=engine,
        engine_ranks=args.engine_tp,
        hf_path=str(args.hf_model),
        home=home,
        lora=lora,
        on_disk=not args.random_weights,
    )
    vary(model.chunks, 1)
    path = paths.of(name)[0] or paths.direct()
    reports: list[SyncReport] = []
    answers: list[Any] = []
    for version in range(1, 1 + max(args.warm_up, 1) + args.syncs):
        vary(model.chunks, version)
        # Twice before: the second answer says what a repeated prompt finds.
        before = model.comm.from_leader(lambda: [_ask(engine)["cached"] for _ in range(2)]) if reports else [0]
        reports.append(publish(model.comm, engine, path, version))
        after = model.comm.from_leader(lambda: _ask(engine))
        answers.append({**after, "cached": {"before": before[-1], "after": after["cached"]}})
    return {
        "reports": reports,
        "answers": answers,
        "base_bytes": getattr(path, "base_bytes", 0),
    }


def _ask(engine: Any) -> dict[str, Any]:
    """What the engine answers to the probe, greedily, and how much of it was in its cache."""
    body = {
        "input_ids": [list(PROBE)],
        "sampling_params": [{"temperature": 0.0, "max_new_tokens": 8}],
        "return_logprob": True,
    }
    if engine.adapter:
        body["lora_path"] = [engine.adapter]
    # On a GPU the first answer waits for kernels to be compiled.
    (reply,) = engine.connected.post("/generate", body, 300.0, admin=False)
    meta = reply["meta_info"]
    logprobs = [found[0] for found in meta["output_token_logprobs"]]
    return {"tokens": reply["output_ids"], "logprobs": logprobs, "cached": meta["cached_tokens"]}


def _compare(found: Mapping[str, Mapping[str, Any]], allowed: float, rounded: Collection[str]) -> None:
    """All methods left the same policy in every version. rounded: see `ROUNDED`."""
    names = list(found)
    exact = [name for name in names if name not in rounded]
    for name in exact[1:]:
        for first, other in zip(found[exact[0]]["reports"], found[name]["reports"], strict=True):
            if first.engine_digest != other.engine_digest:
                raise MethodsError(
                    f"version {first.version}: engine digest {other.engine_digest} by {name}, {first.engine_digest} by "
                    f"{exact[0]}; report this"
                )
    for name in names[1:]:
        for version, (first, other) in enumerate(zip(found[names[0]]["answers"], found[name]["answers"], strict=True)):
            where = f"version {version + 1}: {name} samples other tokens than {names[0]}:"
            if first["tokens"] != other["tokens"]:
                raise MethodsError(f"{where} {other['tokens']} instead of {first['tokens']}")
            if (gap := _gap(first, other)) > allowed:
                raise MethodsError(f"{where} logprobs differ by {gap:.2g}, at most {allowed:g} is accepted")


def _gap(first: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest difference between logprobs at the same place."""
    return max(abs(a - b) for a, b in zip(first["logprobs"], other["logprobs"], strict=True))


def _effect(answers: Sequence[Mapping[str, Any]]) -> float:
    """What another version's adapters change at the probe's first token, whose context is the same, at most."""
    first = [answer["logprobs"][0] for answer in answers]
    return max(first) - min(first)


def _result(
    args: argparse.Namespace,
    lora: LoraConfig,
    ranks: int,
    found: Mapping[str, Mapping[str, Any]],
    rounded: Collection[str],
) -> dict[str, Any]:
    from megatron_sglang.bench import meter
    from megatron_sglang.bench import result as shared

    full = next((one["reports"][-1].bytes for name, one in found.items() if name in ("generic", "disk")), None)
    methods, reference = {}, next(iter(found.values()))["answers"]
    for name, one in found.items():
        measured: Sequence[SyncReport] = one["reports"][-args.syncs :]
        last = measured[-1]
        totals = [sum(report.seconds.values()) for report in measured]
        methods[name] = {
            "bytes": last.bytes,
            "full_over_bytes": full / last.bytes if full else None,
            "buckets": last.buckets,
            "first_s": sum(one["reports"][0].seconds.values()),
            "seconds": meter.spread(totals),
            "phases": {phase: meter.spread([report.seconds[phase] for report in measured]) for phase in last.seconds},
            "cached_tokens": one["answers"][-1]["cached"],
            "largest_gap": max(map(_gap, reference, one["answers"])),
            "engine_base_bytes": one["base_bytes"],
            "update_norm": last.fidelity.update_norm,
        }
    return {
        "command": "megatron-sglang " + " ".join(sys.argv[1:]),
        "versions": shared.versions(),
        "device": shared.device(),
        "ranks": ranks,
        "engine_tp": args.engine_tp,
        "dtype": args.dtype,
        "lora": dataclasses.asdict(lora),
        "syncs": args.syncs,
        "probe_tokens": len(PROBE),
        "equal_digests": [name for name in found if name not in rounded],
        "methods": methods,
        "effect": _effect(reference),
    }


def _table(result: Mapping[str, Any]) -> str:
    heads = ("MB", "x less", "first s", "min s", "median", "max")
    lines = [f"{'method':16} " + " ".join(f"{head:>8}" for head in heads) + "  cached tokens"]
    for name, one in result["methods"].items():
        seconds = " ".join(f"{one['seconds'][key]:8.3f}" for key in ("min", "median", "max"))
        ratio = f"{one['full_over_bytes']:8.1f}" if one["full_over_bytes"] else f"{'':8}"
        cached = "{before} -> {after}".format(**one["cached_tokens"])
        lines.append(f"{name:16} {one['bytes'] / 1e6:8.3f} {ratio} {one['first_s']:8.3f} {seconds}  {cached}")
    return "\n".join(lines)
