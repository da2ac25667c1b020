"""A trainer of one rank without Megatron, for the tests of sync methods: weights, adapters, communicator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from engine_tools import Weights

from megatron_sglang.buckets import Bucket, fill, pack, transfer_order
from megatron_sglang.digests import digest
from megatron_sglang.sync_methods import Folder
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weights.peft_format import AdapterWriter

RANK, ALPHA = 4, 8.0
Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""HF weight -> A [r, in], B [out, r]."""


class Given:
    """`interfaces.Weights` of whatever is in `weights` when it is asked."""

    def __init__(self, weights: Weights, limit: int = 1 << 20) -> None:
        self.weights, self.limit = weights, limit

    def buckets(self, version: int) -> Iterator[Bucket]:
        items = sorted(self.weights.items(), key=lambda item: transfer_order(item[0]))
        for index, part in enumerate(fill(items, lambda tensor: tensor.nbytes, self.limit)):
            yield pack(version, index, part)

    def fidelity(self) -> MergeFidelity:
        return MergeFidelity(0.0, 0.0, 0.0, {})


def draw(weights: Weights, leaves: tuple[str, ...], seed: int, rank: int = RANK) -> Pairs:
    """A random adapter of every weight whose module is one of `leaves`."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in weights if name.removesuffix(".weight").rpartition(".")[2] in leaves]
    return {
        name: (
            torch.randn(rank, weights[name].shape[1], generator=generator) / 11,
            0.2 * torch.randn(weights[name].shape[0], rank, generator=generator),
        )
        for name in names
    }


def merged(weights: Weights, pairs: Pairs) -> Weights:
    """As `weights/merge.py` does on a CPU: products summed in float64 (`cpu/exact_matmul.py`), the rest in float32."""
    deltas = {name: (up.double() @ down.double()).float().mul_(ALPHA / RANK) for name, (down, up) in pairs.items()}
    return {name: tensor + deltas[name] if name in deltas else tensor for name, tensor in weights.items()}


class Drawn:
    """`sync_methods.Adapters` of whatever is in `pairs` when it is asked."""

    scale = ALPHA / RANK

    def __init__(self, pairs: Pairs, home: Path, base: str) -> None:
        self.pairs, self.home, self.base = pairs, home, base
        self.names = sorted(pairs)
        self.rank = RANK

    def buckets(self, version: int) -> Iterator[list[tuple[Bucket, list[tuple[str, str, str]]]]]:
        items = sorted(self.pairs.items(), key=lambda item: transfer_order(item[0]))
        for index, part in enumerate(fill(items, lambda pair: sum(t.nbytes for t in pair), 100_000)):
            named = [(f"{name}.{side}", factor) for name, pair in part for side, factor in zip("AB", pair, strict=True)]
            yield [(pack(version, index, named), [(name, f"{name}.A", f"{name}.B") for name, _ in part])]

    def write(self, version: int) -> Folder:
        folder = self.home / f"policy-v{version}"
        folder.mkdir(parents=True, exist_ok=True)
        modules = {name.removesuffix(".weight"): pair for name, pair in self.pairs.items()}
        shapes = {module: (list(down.shape), list(up.shape)) for module, (down, up) in modules.items()}
        writer = AdapterWriter(
            folder, shapes, torch.float32, rank=self.rank, alpha=self.rank * self.scale, base=self.base
        )
        writer.extend(modules)
        writer.close()
        proof = {
            f"base_model.model.{module}.lora_{side}.weight": digest(factor)
            for module, pair in modules.items()
            for side, factor in zip("AB", pair, strict=True)
        }
        return Folder(str(folder), proof, len(proof), 1, sum(path.stat().st_size for path in folder.iterdir()))

    def fidelity(self) -> MergeFidelity:
        return MergeFidelity(1.0, 0.0, 1.0, {})
