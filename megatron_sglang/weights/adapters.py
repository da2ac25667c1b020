"""The trainer's adapters as they travel: A and B of each Hugging Face weight, whole, gathered by the leader.

`sites.py` takes Megatron's fused and split adapters apart; here those of all ranks come together, a decoder layer at a
time, for an engine that merges them itself (`AdapterStream.buckets`) or serves them beside its base (`write`, a PEFT
folder), and for the converter. Weights that are one layer in Megatron have one A, which travels once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sglang.buckets import Bucket, fill, fusion_key, kind_of, pack, transfer_order
from megatron_sglang.config import LoraConfig
from megatron_sglang.digests import digest
from megatron_sglang.errors import DataError, WeightSyncError
from megatron_sglang.interfaces import Comm
from megatron_sglang.peft_names import CONFIG, WEIGHTS, factor_names
from megatron_sglang.sync_methods import Folder
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weights.disk import FolderHome
from megatron_sglang.weights.peft_format import AdapterWriter, Shapes
from megatron_sglang.weights.sites import Site, find_sites

FactorsByModule = Mapping[str, Sequence[torch.Tensor]]
"""HF module name -> A [r, in] and B [out, r]."""


class Gathered:
    """Brings the adapters of all ranks to the leader, a layer at a time. Made and used by all ranks together.

    shapes: HF module name -> shapes of A and B, of every adapted module of the model. Raises DataError on all ranks for
    an adapter that has no counterpart in the HF model.
    """

    def __init__(self, bridge: Any, model_chunks: list[torch.nn.Module], comm: Comm, dtype: torch.dtype) -> None:
        self.comm, self.dtype = comm, dtype
        self._sites = agreed_sites(bridge, model_chunks, comm)
        own = {
            layer: {name: pair for site in sites if site.is_first_copy for name, pair in site.shapes().items()}
            for layer, sites in self._sites.items()
        }
        self._listed = comm.gather(own)
        """By rank: layer -> module -> shapes, of what that rank sends to the leader."""
        self._layers = sorted({layer for of_rank in self._listed for layer in of_rank}, key=_natural)
        by_layer = (of_rank.get(layer, {}) for layer in self._layers for of_rank in self._listed)
        self.shapes: dict[str, Shapes] = {name: pair for found in by_layer for name, pair in found.items()}

    def layers(self) -> Iterator[FactorsByModule]:
        """The factors of one decoder layer at a time: on the leader all of them, on other ranks only their own."""
        for layer in self._layers:
            yield self._to_leader(self._sites.get(layer, []), [of_rank.get(layer, {}) for of_rank in self._listed])

    def _to_leader(self, sites: Sequence[Site], listed: Sequence[Mapping[str, Any]]) -> FactorsByModule:
        held: dict[str, Sequence[torch.Tensor]] = {}
        for site in sites:
            factors = site.read()
            held |= factors if site.is_first_copy else {}
        if self.comm.rank != 0:
            for name in listed[self.comm.rank]:
                for factor in held[name]:
                    torch.distributed.send(factor.contiguous(), 0)
            return held
        for rank, shapes in enumerate(listed[1:], start=1):
            for name, pair in shapes.items():
                received = [torch.empty(shape, dtype=self.dtype, device=torch.cuda.current_device()) for shape in pair]
                for factor in received:
                    torch.distributed.recv(factor, rank)
                held[name] = received
        return held


def agreed_sites(bridge: Any, model_chunks: list[torch.nn.Module], comm: Comm) -> dict[str, list[Site]]:
    """`find_sites`, with its error on all ranks."""
    found, failure = {}, None
    try:
        found = find_sites(bridge, model_chunks)
    except DataError as error:
        failure = error
    comm.agree(failure)
    return found


class AdapterStream:
    """`sync_methods.Adapters` of a Megatron model. Every rank makes the same calls.

    home: where PEFT folders are written. base: the base model's folder, named in them.
    """

    def __init__(
        self,
        bridge: Any,
        model_chunks: list[torch.nn.Module],
        comm: Comm,
        lora: LoraConfig,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        home: FolderHome | None = None,
        base: str = "",
    ) -> None:
        self.comm, self.lora, self.bucket_bytes, self.home, self.base = comm, lora, bucket_bytes, home, base
        self.scale = lora.alpha / lora.rank
        self._gathered = Gathered(bridge, model_chunks, comm, dtype)
        self._dtype = dtype
        self.names: Sequence[str] = sorted(f"{module}.weight" for module in self._gathered.shapes)
        self._norms: dict[int, float] = {}
        self._changed = self._elements = 0

    @torch.no_grad()
    def buckets(self, version: int) -> Iterator[list[tuple[Bucket, list[tuple[str, str, str]]]]]:
        """The buckets of one layer at a time, each with (weight, A, B) by name; on other ranks than the leader always
        none. A bucket has at most `bucket_bytes`, or one group of weights that fuse, if that is more."""
        index = 0
        for held in self._gathered.layers():
            if self.comm.rank != 0:
                yield []
                continue
            made = []
            named = sorted(((f"{module}.weight", pair) for module, pair in held.items()), key=_in_order)
            for part in fill(named, lambda pair: sum(factor.nbytes for factor in pair), self.bucket_bytes):
                made.append(_packed(version, index, part))
                index += 1
            yield made

    @torch.no_grad()
    def write(self, version: int) -> Folder:
        """The adapters of all ranks as a PEFT folder, complete or absent."""
        assert self.home is not None, "no folder was named for adapters"
        self._norms, self._changed, self._elements = {}, 0, 0
        home, proof, writers = self.home, {}, []
        folder = self.comm.from_leader(lambda: str(home.open(f"policy-v{version}")))

        def open_writer() -> None:
            shapes, lora = self._gathered.shapes, self.lora
            writers.append(
                AdapterWriter(Path(folder), shapes, self._dtype, rank=lora.rank, alpha=lora.alpha, base=self.base)
            )

        def put(held: FactorsByModule) -> None:
            writers[0].extend(held)
            for module, (down, up) in held.items():
                proof.update(zip(factor_names(module), (digest(down), digest(up)), strict=True))
                self._count(module, down, up)

        def close() -> dict[str, Any]:
            writers[0].close()
            proof.update(_idle(Path(folder, WEIGHTS), proof))
            size = sum(Path(folder, name).stat().st_size for name in (WEIGHTS, CONFIG))
            return {"path": str(home.close(f"policy-v{version}")), "proof": proof, "bytes": size}

        self.comm.from_leader(lambda: _writing(folder, open_writer))
        for held in self._gathered.layers():
            self.comm.from_leader(lambda held=held: _writing(folder, lambda: put(held)))
        done = self.comm.from_leader(lambda: _writing(folder, close))
        return Folder(done["path"], done["proof"], tensors=len(done["proof"]), files=1, bytes=done["bytes"])

    def fidelity(self) -> MergeFidelity:
        """Of the adapters last written. SGLang adds B (A x) to what the base gives, so no weight is rounded and the
        cast loses nothing. changed: the share of elements whose weight has an adapter that is not zero. Collective."""
        found = self.comm.from_leader(lambda: [sorted(self._norms.items()), self._changed, self._elements])
        squares, changed, elements = found
        layers = {layer: (square**0.5, 0.0) for layer, square in squares if layer >= 0}
        return MergeFidelity(sum(square for _, square in squares) ** 0.5, 0.0, changed / max(elements, 1), layers)

    def _count(self, module: str, down: torch.Tensor, up: torch.Tensor) -> None:
        """Add one adapter to the sums of `fidelity`: |scale B A|^2 = scale^2 tr((B'B) (A A')), in which both factors
        are only [r, r], while B A would be as large as the weight."""
        up, down = up.double(), down.double()
        square = float(((up.T @ up) * (down @ down.T)).sum()) * self.scale**2
        layer, size = int(kind_of(f"{module}.weight").split(".")[0]), up.shape[0] * down.shape[1]
        self._norms[layer] = self._norms.get(layer, 0.0) + max(square, 0.0)
        self._changed, self._elements = self._changed + (size if square > 0 else 0), self._elements + size


def _packed(version: int, index: int, part: Sequence[tuple[str, Sequence[torch.Tensor]]]) -> Any:
    """A bucket with its (weight, A, B); an A that several weights share is in it once."""
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for name, (down, up) in part:
        down_name, up_name = f"{fusion_key(name)}.lora_A", f"{name}.lora_B"
        tensors.setdefault(down_name, down)
        tensors[up_name] = up
        rows.append((name, down_name, up_name))
    return pack(version, index, list(tensors.items())), rows


def _idle(path: Path, known: Mapping[str, int]) -> dict[str, int]:
    """Digests of the file's other tensors, which are zeros: placeholders that peft needs (`peft_format._idle_down`)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: digest(file.get_tensor(name)) for name in file.keys() if name not in known}  # noqa: SIM118


def _writing(folder: str, work: Any) -> Any:
    """Do `work`; if the disk fails, remove the folder and say so."""
    try:
        return work()
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise WeightSyncError(f"{folder} cannot be written: {error}; make room, or use another log.run_dir") from error


def _in_order(item: tuple[str, Any]) -> tuple[int, str, str]:
    """Sort key of (HF name, ...) that puts weights which fuse side by side, as `fill` needs them."""
    return transfer_order(item[0])


def _natural(name: str) -> list[int | str]:
    """Sort key that takes numbers by their value, so that layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]
