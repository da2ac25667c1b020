"""Merging inside an engine rank: W + (alpha/r) B A from its own untouched base, so that only A and B need to travel.

    merge_base      after the base alone was committed: traces where each adapted Hugging Face weight goes
                    (trace_loader.py) and keeps a copy of those parameters on the CPU (pinned on a GPU)
    merge_begin     opens a version; poisons what will be merged, and nothing else
    merge           one bucket of factors: checks it, merges in fp32, writes into the parameters
    commit          every announced weight merged? everything not adapted still the base's, by digest?
    merge_change    what merging changed, by layer and kind of weight
    merge_witness   keeps the parameters as they are, and `merge_compare` says how far a merge of ours is from them

The base copy is never written, so versions cannot drift. Products are the trainer's (`weights/merge.py`): the same
operations on the same values, in another cut. Torch only; called by `loader.py`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_sglang.buckets import Bucket, kind_of
from megatron_sglang.engine.live_model import refresh, tie_head
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.precision import full_precision
from megatron_sglang.transfer import CHUNK_BYTES, Box, Place, Region, slots_of

CANCELLED = 2**-20
"""What rounding leaves of a sum that is nearly zero, relative to its terms: some units in the last place of fp32."""


@dataclass(slots=True)
class Base:
    """What this rank merges into: the parameters without adapters, and where each adapted weight belongs."""

    dtype: torch.dtype
    """Of the trainer's weights: what the sum is rounded to."""
    names: frozenset[str]
    """Adapted weights of the whole model; a rank holds those of them that it has slots for."""
    slots: Mapping[str, Sequence[Region]]
    pristine: Mapping[str, torch.Tensor]
    digests: Mapping[str, str]
    """Of every parameter of the base."""
    witness: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Merge:
    """One version while it is merged."""

    base: Base
    done: set[str] = field(default_factory=set)
    change: dict[str, torch.Tensor] = field(default_factory=dict)
    """"layer.kind" -> sums over elements [4]: delta^2, (what the cast lost)^2, changed, elements."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """The part of one weight's merge that goes into one slot."""

    name: str
    place: Place
    up: torch.Tensor
    down: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.up.shape[0], self.up.shape[1], self.down.shape[1]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return _view(tensor, Box(0, 0, self.up.shape[0], self.down.shape[1]), self.place)


@torch.no_grad()
def take_base(model: Any, message: Mapping[str, Any], digests: Mapping[str, str]) -> Base:
    """The model's present parameters as the base. ValueError where an adapted weight cannot be merged here."""
    from megatron_sglang.engine.trace_loader import trace

    dtype, names = getattr(torch, message["dtype"]), frozenset(message["names"])
    specs = {name: (tuple(shape), dtype) for name, shape in message["shapes"].items()}
    if unknown := sorted(names - specs.keys()):
        raise ValueError(f"{len(unknown)} adapted weights are none of the model's, {unknown[0]} first")
    layout = trace(model, specs, message["rank"])
    for name in sorted(names & layout.generic.keys()):
        raise ValueError(f"{name} needs the model's own loader and cannot be merged: {layout.generic[name]}")
    adapted = tuple(write for write in layout.writes if write.source in names)
    slots: defaultdict[str, list[Region]] = defaultdict(list)
    try:
        for slot in slots_of(replace(layout, writes=adapted), {name: spec[0] for name, spec in specs.items()}):
            slots[slot.name].append(slot)
    except WeightSyncError as error:
        raise ValueError(str(error)) from error
    parameters = dict(model.named_parameters())
    pristine = {write.param: _to_cpu(parameters[write.param].data) for write in adapted}
    return Base(dtype, names, slots, pristine, digests)


@torch.no_grad()
def begin(model: Any, base: Base) -> Merge:
    """Everything that will be merged is NaN from here on."""
    parameters = dict(model.named_parameters())
    for slot in itertools.chain.from_iterable(base.slots.values()):
        _view(parameters[slot.place.tensor].data, slot.box, slot.place).fill_(torch.nan)
    return Merge(base)


@torch.no_grad()
def merge(model: Any, state: Merge, bucket: Bucket, factors: Sequence[Sequence[str]], scale: float) -> None:
    """factors: (weight, A, B), the last two by their names in `bucket`. A [r, in], B [out, r]."""
    tensors, pieces = dict(bucket.tensors()), []
    for name, down_name, up_name in factors:
        if name not in state.base.names:
            raise ValueError(f"{name} was not announced as an adapted weight; establish the base again")
        if name in state.done:
            raise ValueError(f"the adapter of {name} arrived twice")
        state.done.add(name)
        down, up = tensors[down_name], tensors[up_name]
        if up.shape[1] != len(down):
            raise ValueError(f"the adapter of {name} has A {list(down.shape)} and B {list(up.shape)}, of other ranks")
        pieces += [_piece(name, slot, down, up) for slot in state.base.slots.get(name, ())]
    parameters = dict(model.named_parameters())
    for _, alike in itertools.groupby(sorted(pieces, key=lambda piece: piece.shape), key=lambda piece: piece.shape):
        for chunk in _chunks(list(alike)):
            _merge_chunk(parameters, state, chunk, scale)


def _piece(name: str, slot: Region, down: torch.Tensor, up: torch.Tensor) -> _Piece:
    box = slot.box
    if box.row + box.rows > len(up) or box.col + box.cols > down.shape[1]:
        raise ValueError(
            f"the adapter of {name} is for a weight {[len(up), down.shape[1]]}, of which this rank needs rows up to "
            f"{box.row + box.rows} and columns up to {box.col + box.cols}"
        )
    rows, columns = up[box.row : box.row + box.rows], down[:, box.col : box.col + box.cols]
    return _Piece(name, slot.place, rows, columns)


def _merge_chunk(parameters: Mapping[str, torch.Tensor], state: Merge, pieces: Sequence[_Piece], scale: float) -> None:
    """Pieces of equal shape at once: [n, rows, cols]."""
    device = parameters[pieces[0].place.tensor].device
    base = torch.stack(
        [piece.of(state.base.pristine[piece.place.tensor]).to(device, non_blocking=True).float() for piece in pieces]
    )
    up, down = (torch.stack([getattr(piece, name) for piece in pieces]).float() for name in ("up", "down"))
    with full_precision():
        # Not `torch.bmm`: deterministic engines have SGLang's kernel in its place, which multiplies as TF32.
        delta = torch.baddbmm(torch.zeros_like(base), up, down, beta=0).mul_(scale)
    whole = base + delta
    cast = whole.to(state.base.dtype)
    for piece, merged in zip(pieces, cast, strict=True):
        piece.of(parameters[piece.place.tensor].data).copy_(merged)
    kept = cast.float()
    elements = torch.full((len(pieces),), float(delta[0].numel()), dtype=torch.float64, device=device)
    sums = [delta.square().sum((1, 2)), (whole - kept).square().sum((1, 2)), (kept != base).sum((1, 2))]
    found = torch.stack([*(part.double() for part in sums), elements], 1)
    for piece, row in zip(pieces, found, strict=True):
        key = kind_of(piece.name)
        state.change[key] = state.change[key] + row if key in state.change else row


def finish(model: Any, state: Merge, digests: Callable[[Any], dict[str, str]]) -> dict[str, str]:
    """Digests of all parameters. ValueError: an adapter did not come, or something that has none is not the base's."""
    if missing := sorted(state.base.names - state.done):
        raise ValueError(f"the adapters of {len(missing)} weights did not arrive, {missing[0]} first")
    tie_head(model)
    refresh(model)
    found = digests(model)
    odd = sorted(name for name in found if name not in state.base.pristine and found[name] != state.base.digests[name])
    if odd:
        raise ValueError(
            f"{len(odd)} parameters without adapters are not the base's any more, {odd[0]} first; publish again, which "
            "sends the base anew"
        )
    return found


def keep_witness(model: Any, base: Base) -> None:
    """The adapted parameters as they are now, merged by the trainer."""
    parameters = dict(model.named_parameters())
    base.witness = {name: _to_cpu(parameters[name].data) for name in base.pristine}


@torch.no_grad()
def compare(model: Any, base: Base, tolerance: float) -> dict[str, Any]:
    """How far the parameters are from the witness, which is given up: differing elements, all elements, and the largest
    difference in units of `tolerance` times the larger of the two values. Where base and product nearly cancel, of
    what fp32 keeps of either: `CANCELLED` of the parameter's root mean square."""
    parameters, different, elements, worst = dict(model.named_parameters()), 0, 0, 0.0
    for name, expected in base.witness.items():
        found = parameters[name].data.cpu().float()
        expected = expected.float()
        gap = (found - expected).abs()
        allowed = tolerance * torch.maximum(found.abs(), expected.abs()) + CANCELLED * expected.square().mean().sqrt()
        different, elements = different + int(gap.count_nonzero()), elements + gap.numel()
        worst = max(worst, float(torch.where(gap > 0, gap / allowed, gap).max()))
    base.witness = {}
    return {"different": different, "elements": elements, "worst": worst}


def _view(tensor: torch.Tensor, box: Box, place: Place) -> torch.Tensor:
    strides = (place.row_stride, place.col_stride)
    return tensor.as_strided((box.rows, box.cols), strides, tensor.storage_offset() + place.offset)


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    copy = torch.empty_like(tensor, device="cpu", memory_format=torch.preserve_format)
    if copy.stride() != tensor.stride():
        raise ValueError(f"a parameter {list(tensor.shape)} has strides {tensor.stride()}, which a copy cannot keep")
    return (copy.pin_memory() if tensor.is_cuda else copy).copy_(tensor)


def _chunks(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    rows, _, cols = pieces[0].shape
    step = max(1, CHUNK_BYTES // (rows * cols * 4))
    for start in range(0, len(pieces), step):
        yield pieces[start : start + step]
