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
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from megatron_sglang.weights.peft_format import AdapterFolder
    from megatron_sglang.weights.standalone import Model

Dtype = Literal["float32", "bfloat16"]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Where config.json says how many routed experts there are."""
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
    to_megatron.add_argument("--target-modules", nargs="+", help="Megatron's names; follow from --adapter if given")
    for direction in (to_hf, to_megatron):
        direction.add_argument("--hf-model", type=Path, required=True, help="folder of the base model")
        for name in SIZES:
            direction.add_argument(f"--{name}", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> None:
    """Run one conversion; the leader says what was written."""
    from megatron_sglang.weights import standalone

    sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
    if args.direction == "to-hf":
        if args.adapter_only:
            done = export_adapter(args.hf_model, args.load, args.output, iteration=args.iteration, sizes=sizes)
        else:
            shard_bytes = int(args.shard_gb * 10**9)
            done = export_merged(
                args.hf_model, args.load, args.output, iteration=args.iteration, sizes=sizes, shard_bytes=shard_bytes
            )
        text = f"{args.output}: {done} tensors"
    else:
        given = {"rank": args.lora_rank, "alpha": args.lora_alpha, "targets": args.target_modules}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
        lora = import_adapter(args.hf_model, args.save, adapter=args.adapter, sizes=sizes, dtype=args.dtype, **given)
        targets = ",".join(lora.targets)
        text = f"{args.save}: train with lora.rank={lora.rank} lora.alpha={lora.alpha:g} lora.targets={targets}"
    standalone.leave()
    if _is_leader():
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

    sizes: parallel sizes by Megatron's flag name, e.g. {"expert-model-parallel-size": 2}. The dtype is the run's.
    Raises DataError: no or a foreign checkpoint, a missing model, an output folder that is not empty.
    """
    from megatron_sglang.weights import standalone, write

    hf_model, output = _model_folder(hf_model), Path(output)
    write.require_new(output)
    stored = standalone.find_checkpoint(Path(load), iteration)
    with standalone.adapted_model(hf_model, stored.lora, stored.dtype, sizes or {}, base=True) as model:
        from megatron_sglang.weights.export import hf_layers, hf_shapes  # Megatron needs the CPU room where it is used
        from megatron_sglang.weights.merge import MergeStats

        standalone.load_adapters(model, stored.folder)
        expected = hf_shapes(str(hf_model))
        missing = set(expected)
        with _new_folder(model, output) as folder, _progress("merging", len(expected)) as advance:
            writer = write.ShardWriter(folder, shard_bytes)
            for layer in hf_layers(model.bridge, model.chunks, MergeStats()):
                for name, tensor in layer:
                    if expected.get(name) != tuple(tensor.shape):
                        raise DataError(
                            f"{name} is {list(tensor.shape)} in Megatron, {expected.get(name)} in {hf_model}"
                        )
                missing -= {name for name, _ in layer}
                model.comm.from_leader(lambda layer=layer: writer.extend(layer))
                advance(len(layer))
            if missing:
                raise DataError(
                    f"{len(missing)} tensors of {hf_model} have no counterpart in Megatron's model, {min(missing)} "
                    "first; Megatron-Bridge does not know this architecture whole"
                )
            model.comm.from_leader(writer.close)
            model.comm.from_leader(lambda: write.copy_all_but_weights(hf_model, folder, stored.dtype))
    return len(expected)


def export_adapter(
    hf_model: str | Path,
    load: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> int:
    """Write the adapters as a PEFT folder; the number of adapted modules. As `export_merged`; the base is not read."""
    from megatron_sglang.weights import peft_format, standalone, write

    hf_model, output = _model_folder(hf_model), Path(output)
    write.require_new(output)
    stored = standalone.find_checkpoint(Path(load), iteration)
    with standalone.adapted_model(hf_model, stored.lora, stored.dtype, sizes or {}, base=False) as model:
        standalone.load_adapters(model, stored.folder)
        with _new_folder(model, output) as folder:
            factors = _to_leader(model, stored.dtype)

            def save() -> int:
                lora = stored.lora
                peft_format.write_adapter(folder, factors, rank=lora.rank, alpha=lora.alpha, base=str(hf_model))
                return len(factors)

            return model.comm.from_leader(save)


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
    given, what it needs is the default. dtype: None is config.json's. Raises DataError: an adapter that Megatron's LoRA
    cannot express or that is not this model's, a rank below what it needs, a missing model, a folder that is not empty.
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
        experts = next((config[name] for name in _EXPERTS if config.get(name)), 0)
        given = peft_format.AdapterFolder(Path(adapter), experts)
        options = given.lora_config(lora.get("rank"))
    else:
        options = LoraConfig(**lora)
    dtype = dtype or ("float32" if config.get("dtype", config.get("torch_dtype")) == "float32" else "bfloat16")
    with standalone.adapted_model(hf_model, options, dtype, sizes or {}, base=False) as model:
        if given is not None:
            _from_folder(model, given, options)
        with _new_folder(model, save) as folder:
            standalone.save_release(model, folder)
            model.comm.from_leader(lambda: standalone.write_stored(folder / standalone.RELEASE, options, dtype))
    return options


def _to_leader(model: Model, dtype: Dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (A, B) of the whole model, in host memory of rank 0; empty on the others. A layer at a time."""
    import torch

    from megatron_sglang.weights.sites import find_sites

    comm, local = model.comm, find_sites(model.bridge, model.chunks)
    whole: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def receive(shape: list[int], rank: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=torch.cuda.current_device())
        torch.distributed.recv(tensor, rank)
        return tensor.cpu()

    layers = _all_layers(model, local)
    with _progress("collecting", len(layers)) as advance:
        for layer in layers:
            mine: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for site in local.get(layer, ()):
                factors = site.read()
                mine |= factors if site.is_first_copy else {}
            listed = comm.gather({name: [list(factor.shape) for factor in pair] for name, pair in mine.items()})
            if comm.rank == 0:
                whole |= {name: (down.cpu(), up.cpu()) for name, (down, up) in mine.items()}
                for rank, shapes in enumerate(listed[1:], start=1):
                    for name, (down, up) in shapes.items():
                        whole[name] = (receive(down, rank), receive(up, rank))
            else:
                for factor in (factor for pair in mine.values() for factor in pair):
                    torch.distributed.send(factor.contiguous(), 0)
            advance(1)
    return whole


def _from_folder(model: Model, adapter: AdapterFolder, options: LoraConfig) -> None:
    """Set the adapters of all ranks. DataError where `adapter` has a module that the model lacks."""
    from megatron_sglang.weights.sites import find_sites

    local = find_sites(model.bridge, model.chunks)
    used: list[str] = []
    failure: DataError | None = None
    with _progress("reading", len(local)) as advance:
        for sites in local.values():
            for site in sites:
                parts = {part: adapter.factors(name) for part, name in site.modules.items()}
                found = {part: factors for part, factors in parts.items() if factors is not None}
                used += [site.modules[part] for part in found]
                try:
                    if found:
                        site.write(found, options.alpha / options.rank)
                except DataError as error:  # the same on all ranks of the site, so that none waits for another
                    failure = failure or error
            advance(1)
    model.comm.agree(failure)
    unused = set(adapter.modules).difference(*model.comm.gather(used))
    if unused:
        raise DataError(
            f"{adapter.folder} adapts {len(unused)} modules that the model does not have, {min(unused)} first; "
            "give the model that the adapter was trained on"
        )


def _all_layers(model: Model, local: Mapping[str, Any]) -> list[str]:
    """Names of the decoder layers of all ranks, in the model's order."""
    names = {name for found in model.comm.gather(list(local)) for name in found}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


@contextlib.contextmanager
def _new_folder(model: Model, folder: Path) -> Iterator[Path]:
    """`write.complete_or_absent` by the leader, for all ranks, with its errors on all ranks."""
    from megatron_sglang.weights.write import complete_or_absent, partial_name

    with contextlib.ExitStack() as stack:
        model.comm.from_leader(lambda: str(stack.enter_context(complete_or_absent(folder))))
        yield partial_name(folder)
        model.comm.from_leader(stack.close)


@contextlib.contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the leader's stderr; yields what advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.__stderr__)  # past the redirection of what Megatron prints
    with Progress(console=console, transient=True, disable=not _is_leader()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda steps: bar.advance(task, steps)


def _is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _model_folder(hf_model: str | Path) -> Path:
    folder = Path(hf_model)
    if not (folder / "config.json").is_file():
        raise DataError(f"--hf-model {folder} has no config.json; give the folder of the base model")
    return folder
