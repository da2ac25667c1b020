"""Checkpoints to Hugging Face folders and back, outside of a run; alone, or on the ranks of torchrun.

    megatron-sglang convert to-hf --hf-model DIR --load CKPT --output DIR [--adapter-only] [--iteration N]
    megatron-sglang convert to-megatron --hf-model DIR --save CKPT [--adapter PEFT_DIR] [--lora-rank R]

Both take Megatron's parallel sizes, which need not be those that the checkpoint was written or will be read with.
Torch and Megatron are imported when a conversion runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_sglang.checkpoint_folder import RELEASE
from megatron_sglang.config import LoraConfig
from megatron_sglang.config_check import checked_lora, split_targets
from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.hf_files import count_experts, prediction_shapes, tensor_shapes
from megatron_sglang.weights.progress import is_leader, progress

if TYPE_CHECKING:
    from megatron_sglang.weights.peft_format import AdapterFolder
    from megatron_sglang.weights.shard_folder import ShardFolder
    from megatron_sglang.weights.standalone import Model, Stored

Dtype = Literal["float32", "bfloat16"]
BUCKET_BYTES = 2**28
"""How much of the merged weights is gathered at a time, on every rank."""
SIZES = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare both directions on the parser of `megatron-sglang convert`."""
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser("to-hf", help="a checkpoint's merged weights, or its adapters for peft")
    to_hf.add_argument("--load", type=Path, required=True, help="folder that a run saved to")
    to_hf.add_argument("--output", type=Path, required=True, help="new folder")
    to_hf.add_argument("--iteration", type=int, help="which checkpoint; the newest unless given")
    to_hf.add_argument("--adapter-only", action="store_true", help="write a PEFT adapter instead of merged weights")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes (5)")
    to_megatron = directions.add_parser("to-megatron", help="a checkpoint that a run can --load")
    to_megatron.add_argument("--save", type=Path, required=True, help="new folder")
    to_megatron.add_argument("--adapter", type=Path, help="PEFT adapter to start from; fresh adapters unless given")
    to_megatron.add_argument("--lora-rank", type=int, help="16, or what --adapter needs")
    to_megatron.add_argument("--lora-alpha", type=float, help="32; follows from --adapter if that is given")
    to_megatron.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the adapters; config.json's if absent"
    )
    to_megatron.add_argument("--target-modules", nargs="+", help="as lora.targets; follow from --adapter if given")
    for direction in (to_hf, to_megatron):
        direction.add_argument("--hf-model", type=Path, required=True, help="folder of the base model")
        for name in SIZES:
            direction.add_argument(f"--{name}", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> None:
    """Run one conversion; the leader says what was written."""
    sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"--{name}={size} is no number of ranks; give 1 or more")
    if args.direction == "to-hf" and not 0 < args.shard_gb < math.inf:
        raise ConfigError(f"--shard-gb={args.shard_gb} is no size of a file; give one above 0, such as 5")

    from megatron_sglang.weights import standalone

    if args.direction == "to-hf":
        if args.adapter_only:
            done = export_adapter(args.hf_model, args.load, args.output, iteration=args.iteration, sizes=sizes)
        else:
            shard_bytes = int(args.shard_gb * 10**9)
            done = export_merged(
                args.hf_model, args.load, args.output, iteration=args.iteration, sizes=sizes, shard_bytes=shard_bytes
            )
        text = f"{args.output}: {done} tensors"
        if not args.adapter_only and (copied := len(prediction_shapes(args.hf_model))):
            text += f", {copied} of them the base's own: layers for multi-token prediction, which are not trained"
    else:
        targets = None if args.target_modules is None else split_targets(args.target_modules)
        given = {"rank": args.lora_rank, "alpha": args.lora_alpha, "targets": targets}
        given = {name: value for name, value in given.items() if value is not None}
        lora = import_adapter(args.hf_model, args.save, adapter=args.adapter, sizes=sizes, dtype=args.dtype, **given)
        targets = ",".join(lora.targets)
        text = f"{args.save}: train with lora.rank={lora.rank} lora.alpha={lora.alpha!r} lora.targets={targets}"
    standalone.leave()
    if is_leader():
        print(text)


def export_merged(
    hf_model: str | Path,
    load: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    sizes: Mapping[str, int] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """Write base plus adapters as a Hugging Face model; the number of its tensors. Collective over torchrun's ranks.
    Layers for multi-token prediction, which no run trains, are the base's.

    sizes: parallel sizes by Megatron's flag name, e.g. {"expert-model-parallel-size": 2}. The dtype is the run's.
    shard_bytes: largest weight file; rank 0 holds one of them besides the model, all ranks hold one bucket.
    After an interruption the same call goes on where the last one stopped; the layout may be another.
    Raises DataError: no or a foreign checkpoint, a missing model, an output folder that is not empty, an unfinished
    conversion of something else.
    """
    from megatron_sglang.weights import shard_folder, standalone, write

    hf_model, output = _model_folder(hf_model), Path(output)
    stored = standalone.find_checkpoint(Path(load), iteration)
    source = _source(hf_model, stored)
    shard_folder.require_continuable(output, source)
    with standalone.adapted_model(hf_model, stored.lora, stored.dtype, sizes or {}, base=True) as model:
        standalone.load_adapters(model, stored.folder)
        expected, predicting = tensor_shapes(hf_model), prediction_shapes(hf_model)
        with _of_leader(model, lambda: shard_folder.continued(output, source, shard_bytes)) as folder:
            bases = write.read_tensors(hf_model, predicting, stored.dtype)
            write_merged(model, expected, stored.dtype, folder, min(shard_bytes, BUCKET_BYTES), bases)
            model.comm.from_leader(lambda: write.copy_all_but_weights(hf_model, folder.path, stored.dtype))
    return len(expected) + len(predicting)


def export_adapter(
    hf_model: str | Path,
    load: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> int:
    """Write the adapters as a PEFT folder; the number of adapted modules. The base is not read.

    As `export_merged`, but begun anew after an interruption: it is one file, and small. Rank 0 holds a layer of it.
    """
    from megatron_sglang.weights import standalone, write

    hf_model, output = _model_folder(hf_model), Path(output)
    write.require_new(output)
    stored = standalone.find_checkpoint(Path(load), iteration)
    with standalone.adapted_model(hf_model, stored.lora, stored.dtype, sizes or {}, base=False) as model:
        standalone.load_adapters(model, stored.folder)
        with _new_folder(model, output) as folder:
            return write_adapter(model, stored, folder, base=str(hf_model))


def import_adapter(
    hf_model: str | Path,
    save: str | Path,
    *,
    adapter: str | Path | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: Dtype | None = None,
    **lora: Any,
) -> LoraConfig:
    """Write a checkpoint that a run can --load as its start, in any layout; the lora.* options that run must have.

    adapter: PEFT folder; None: fresh adapters (B = 0). lora: rank, alpha, targets; with an adapter only rank may be
    given, what it needs is the default. dtype: None is config.json's. Raises ConfigError: options of no adapter;
    DataError: an adapter that Megatron's LoRA cannot express or that is not this model's, a rank below what it needs, a
    missing model, a folder that is not empty.
    """
    from megatron_sglang.weights import peft_format, standalone, write

    hf_model, save = _model_folder(hf_model), Path(save)
    write.require_new(save)
    config = json.loads((hf_model / "config.json").read_text())
    given = None
    if adapter is not None:
        if lora.keys() - {"rank"}:
            raise ConfigError(
                f"{' and '.join(lora.keys() - {'rank'})} follow from --adapter; give them without it only"
            )
        given = peft_format.AdapterFolder(Path(adapter), count_experts(config))
        options = given.lora_config(lora.get("rank"))
    else:
        options = checked_lora(LoraConfig(**lora))
    dtype = dtype or ("float32" if config.get("dtype", config.get("torch_dtype")) == "float32" else "bfloat16")
    with standalone.adapted_model(hf_model, options, dtype, sizes or {}, base=False) as model:
        if given is not None:
            _from_folder(model, given, options, dtype)
        with _new_folder(model, save) as folder:
            standalone.save_release(model, folder)
            model.comm.from_leader(lambda: standalone.write_stored(folder / RELEASE, options, dtype))
    return options


def write_merged(
    model: Model,
    expected: Mapping[str, tuple[int, ...]],
    dtype: Dtype,
    folder: ShardFolder | None,
    bucket_bytes: int,
    others: Iterable[tuple[str, Any]] = (),
) -> None:
    """Write the shards that `folder` lacks. Collective; only the leader has a folder.

    expected: name -> shape of the whole model. bucket_bytes: how much is gathered before the leader takes it. others:
    tensors that the folder gets besides; asked for on the leader only.
    """
    import torch

    from megatron_sglang.buckets import fill
    from megatron_sglang.weights.stream import merged_tensors

    itemsize = getattr(torch, dtype).itemsize
    writer: Any = folder
    done = set(model.comm.from_leader(lambda: sorted(writer.done)))
    nbytes = {name: math.prod(shape) * itemsize for name, shape in expected.items()}
    tensors = merged_tensors(model.bridge, model.chunks, model.comm, expected, done)
    there = sum(nbytes.get(name, 0) for name in done)
    with progress("merging", sum(nbytes.values()), there) as advance:
        for bucket in fill(tensors, lambda tensor: tensor.numel() * tensor.element_size(), bucket_bytes):
            model.comm.from_leader(lambda bucket=bucket: writer.extend(bucket))
            advance(sum(nbytes[name] for name, _ in bucket))
            bucket.clear()  # before the next one is gathered
        model.comm.from_leader(lambda: writer.extend(item for item in others if item[0] not in done))
        model.comm.from_leader(lambda: writer.close())


def write_adapter(model: Model, stored: Stored, folder: Path, base: str) -> int:
    """Write the adapters of all ranks to `folder`, a layer at a time; the number of adapted modules. Collective."""
    import torch

    from megatron_sglang.weights.adapters import Gathered
    from megatron_sglang.weights.peft_format import AdapterWriter

    lora, dtype = stored.lora, getattr(torch, stored.dtype)
    gathered = Gathered(model.bridge, model.chunks, model.comm, dtype)
    total = sum(math.prod(shape) for pair in gathered.shapes.values() for shape in pair) * dtype.itemsize

    def open_file() -> Any:
        writer = AdapterWriter(folder, gathered.shapes, dtype, rank=lora.rank, alpha=lora.alpha, base=base)
        return contextlib.closing(writer)

    with _of_leader(model, open_file) as writer, progress("collecting", total) as advance:
        for held in gathered.layers():
            model.comm.from_leader(lambda held=held: writer.extend(held))
            advance(sum(factor.nbytes for pair in held.values() for factor in pair))
    return len(gathered.shapes)


def _from_folder(model: Model, adapter: AdapterFolder, options: LoraConfig, dtype: Dtype) -> None:
    """Set the adapters of all ranks. DataError where `adapter` has a module that the model lacks."""
    import torch

    from megatron_sglang.weights.adapters import agreed_sites

    local = [site for sites in agreed_sites(model.bridge, model.chunks, model.comm).values() for site in sites]
    nbytes = [
        sum(math.prod(shape) for pair in site.shapes().values() for shape in pair) * getattr(torch, dtype).itemsize
        for site in local
    ]
    used: list[str] = []
    failure: DataError | None = None
    with progress("reading", sum(nbytes)) as advance:
        for site, of_site in zip(local, nbytes, strict=True):
            parts = {part: adapter.factors(name) for part, name in site.modules.items()}
            found = {part: factors for part, factors in parts.items() if factors is not None}
            used += [site.modules[part] for part in found]
            try:
                if found:
                    site.write(found, options.alpha / options.rank)
            except DataError as error:  # the same on all ranks of the site, so that none waits for another
                failure = failure or error
            advance(of_site)
    model.comm.agree(failure)
    unused = set(adapter.modules).difference(*model.comm.gather(used))
    if unused:
        raise DataError(
            f"{adapter.folder} adapts {len(unused)} modules that the model does not have, {min(unused)} first; "
            "give the model that the adapter was trained on"
        )


def _source(hf_model: Path, stored: Stored) -> dict[str, str]:
    """What a folder of merged weights is made of, for telling one conversion from another."""
    from megatron_sglang.weights.shard_folder import state_of_files

    return {
        "model": str(hf_model.resolve()),
        "checkpoint": str(stored.folder.resolve()),
        "dtype": stored.dtype,
        "state of the model's files": state_of_files(hf_model),
        "state of the checkpoint's files": state_of_files(stored.folder),
    }


@contextlib.contextmanager
def _new_folder(model: Model, folder: Path) -> Iterator[Path]:
    """`write.complete_or_absent` by the leader, for all ranks, with its errors on all ranks."""
    from megatron_sglang.weights.write import complete_or_absent, partial_name

    with _of_leader(model, lambda: complete_or_absent(folder)):
        yield partial_name(folder)


@contextlib.contextmanager
def _of_leader(model: Model, make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[Any]:
    """A context that only the leader enters, with its errors on all ranks; yields None on the others."""
    entered = []
    with contextlib.ExitStack() as stack:
        model.comm.from_leader(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None
        model.comm.from_leader(stack.close)


def _model_folder(hf_model: str | Path) -> Path:
    folder = Path(hf_model)
    if not (folder / "config.json").is_file():
        raise DataError(f"--hf-model {folder} has no config.json; give the folder of the base model")
    return folder
