"""The record that carries weights from trainer to engine. Torch only.

A bucket is one flat uint8 tensor plus, for each named tensor in it, where it lies. The trainer packs
(`pack`), the engine rank unpacks without copying (`Bucket.tensors`).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_sglang.digests import digests

ALIGNMENT = 16
"""Bytes; every tensor starts on a multiple of it so that a view in its own dtype is legal."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape, dtype ("float32", ...), byte offset in the bucket, and digest of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    digest: int

    @property
    def nbytes(self) -> int:
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class Bucket:
    """`data` is [nbytes] uint8, contiguous. `index` counts from 0 within one weight version."""

    version: int
    index: int
    specs: tuple[TensorSpec, ...]
    data: torch.Tensor

    def header(self) -> str:
        """Everything but the bytes, as JSON: what travels beside `data`."""
        specs = [asdict(spec) for spec in self.specs]
        return json.dumps({"version": self.version, "index": self.index, "specs": specs})

    @staticmethod
    def from_header(header: str, data: torch.Tensor) -> Bucket:
        fields = json.loads(header)
        specs = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in fields["specs"])
        return Bucket(fields["version"], fields["index"], specs, data)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, view into `data`) in packing order; no bytes are copied."""
        for spec in self.specs:
            flat = self.data[spec.offset : spec.offset + spec.nbytes]
            yield spec.name, flat.view(getattr(torch, spec.dtype)).view(spec.shape)


def pack(version: int, index: int, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    """Copy tensors of any dtype, shape and stride (one device) into one bucket, digests included."""
    specs: list[TensorSpec] = []
    end = 0
    for (name, tensor), digest in zip(named_tensors, digests(tensor for _, tensor in named_tensors), strict=True):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, start, digest))
        end = start + tensor.numel() * tensor.element_size()
    device = named_tensors[0][1].device if named_tensors else torch.device("cpu")
    data = torch.zeros(end, dtype=torch.uint8, device=device)
    bucket = Bucket(version, index, tuple(specs), data)
    for (_, source), (_, target) in zip(named_tensors, bucket.tensors(), strict=True):
        target.copy_(source)
    return bucket


NAMES = 1 << 17
"""Of how many tensors keys are kept: a plan asks for those of each some ten times."""


@functools.lru_cache(NAMES)
def fusion_key(name: str) -> str:
    """Tensors with the same key become one parameter in the engine, so they must reach its loader together.

    SGLang fuses q, k and v, gate and up, and (DeepSeek) q_a and kv_a; a loader that is given half of such a group may
    keep the other half for a call that never comes, without an error.
    """
    name = re.sub(r"\.(q|k|v)_proj\.", ".qkv_proj.", name)
    name = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
    return re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".qkv_a_proj.", name)


@functools.lru_cache(NAMES)
def transfer_order(name: str) -> tuple[int, str, str]:
    """Sort key of HF names: what is outside the layers, then layer after layer, fused tensors side by side."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer.group(1)) if layer else -1, fusion_key(name), name


def kind_of(name: str) -> str:
    """Decoder layer (-1 outside of them) and kind of an HF weight: "3.q_proj"; "3.up_proj" for all experts."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return f"{layer[1] if layer else -1}.{name.removesuffix('.weight').rpartition('.')[2]}"


def fill[T](items: Iterable[tuple[str, T]], nbytes: Callable[[T], int], limit: int) -> Iterator[list[tuple[str, T]]]:
    """Cut a stream of (name, item) into buckets of at most `limit` bytes, never within a fusion group.

    A group larger than `limit` gets a bucket of its own. The members of a group must be neighbours in the stream,
    as they are in `transfer_order`.
    """
    bucket: list[tuple[str, T]] = []
    filled = 0
    for _, members in itertools.groupby(items, key=lambda item: fusion_key(item[0])):
        group = list(members)
        needed = sum(nbytes(item) for _, item in group)
        if bucket and filled + needed > limit:
            yield bucket
            bucket, filled = [], 0
        bucket += group
        filled += needed
    if bucket:
        yield bucket


def plan(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of each bucket of a whole model. sizes: bytes by HF name."""
    stream = ((name, sizes[name]) for name in sorted(sizes, key=transfer_order))
    return [[name for name, _ in bucket] for bucket in fill(stream, lambda size: size, limit)]
