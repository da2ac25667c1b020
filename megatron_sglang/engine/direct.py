"""The direct path inside an engine rank: parts of a flat buffer go straight into the parameters.

Torch only; called by `loader.py`; words in `transfer.py`. The plan is installed once and checked against the live
parameters: every element of each must be written exactly once, by a copy or a constant. For each segment of a delivery
two digests are compared with the sender's: of what arrived, and of what the parameters hold afterwards. So a version
whose deliveries were all taken has filled every parameter, and there is no need to poison them before it, as there is
on the generic path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_sglang import digests as digest_of
from megatron_sglang.copies import Copy
from megatron_sglang.engine.live_model import casts, derive, recast, tie_head


@dataclass(slots=True)
class Plan:
    """What this rank writes: for each delivery (`buckets`) the copies out of it, and constants (padding). The other
    fields are filled with the first version, and used again as long as they fit."""

    buckets: tuple[tuple[Copy, ...], ...]
    constants: tuple[tuple[Copy, float], ...]
    geometry: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """(shape, strides, dtype) of each parameter, of which the plan has been proved to write every element."""
    launches: dict[int, Any] = field(default_factory=dict)
    """By number of the delivery: `copy_kernel.Moves`, which does all its copies in one launch; None where they are done
    one by one."""
    proof: digest_of.Finite | None = None
    """Digests all parameters in one launch."""


class Live:
    """A model's parameters, and the casts that follow them, while a version streams in. They are looked up once for all
    deliveries, since that takes a millisecond; but anew for each version, since SGLang may replace parameters between
    two. That costs nothing: the trainer merges its first delivery meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = _parameters(model)
        self.casts = casts(model)
        self.numbers = {name: number for number, name in enumerate(self.parameters)}
        first = next(iter(self.parameters.values()))
        self.device = first.device
        found = [parameter.data_ptr() for parameter in self.parameters.values()]
        self.aligned = all(address % 16 == 0 for address in found)
        self.addresses = torch.tensor(found, dtype=torch.int64).to(self.device)

    @classmethod
    def by(cls, plan: Plan, model: Any) -> Live:
        """For a version by `plan`. ValueError if these are not the parameters for which it was checked."""
        live = cls(model)
        if (found := _geometry(live.parameters)) != plan.geometry:
            changed = sorted(name for name, _ in found.items() ^ plan.geometry.items())
            raise ValueError(
                f"parameter {changed[0]} is another one than when the plan was checked: {found.get(changed[0])}, "
                f"expected (shape, strides, dtype) {plan.geometry.get(changed[0])}; make the plan anew"
            )
        return live


@torch.no_grad()
def check(model: Any, message: dict[str, Any]) -> Plan:
    """The plan in a message. ValueError if it does not write each element of each parameter exactly once."""
    plan = Plan(
        tuple(tuple(_copy(row) for row in bucket) for bucket in message["buckets"]),
        tuple((_copy(row), value) for row, value in message["constants"]),
    )
    parameters = _parameters(model)
    plan.geometry.update(_geometry(parameters))
    by_name: dict[str, list[Copy]] = {name: [] for name in parameters}
    for copy in (*(copy for bucket in plan.buckets for copy in bucket), *(copy for copy, _ in plan.constants)):
        if copy.tensor not in by_name:
            raise ValueError(f"the plan writes to {copy.tensor}, which is no parameter of this model")
        by_name[copy.tensor].append(copy)
    for name, copies in by_name.items():
        written = torch.zeros_like(parameters[name], dtype=torch.bool)
        for copy in copies:
            copy.of(written).fill_(True)
        size, missing = written.numel(), int((~written).sum())
        total = sum(math.prod(copy.sizes) for copy in copies)
        if missing or total != size:
            raise ValueError(
                f"the plan leaves {missing} elements of {name} unwritten and writes {total - size + missing} repeatedly"
            )
    return plan


@torch.no_grad()
def deliver(live: Live, plan: Plan, index: int, message: dict[str, Any], data: torch.Tensor) -> None:
    """Write delivery `index`. ValueError if its bytes are not those that were sent, or are not in the parameters.

    Copied one by one, bytes are checked before they touch a parameter. By kernel, writing and reading back are under
    way before the first digest is read, so a parameter may take wrong bytes and keep them until the next version. That
    is as harmless as a version that fails between two deliveries, which leaves some parameters new and others old:
    nothing is served until a whole version has been proved.
    """
    flat = data.view(getattr(torch, message["dtype"]))
    copies = plan.buckets[index]
    lengths, digests = message["lengths"], message["digests"]
    expected = sum(math.prod(copy.sizes) for copy in copies)
    if sum(lengths) != flat.numel() or flat.numel() != expected:
        raise ValueError(
            f"delivery {index}, {named(copies)}: it has {flat.numel()} elements of {message['dtype']}, expected "
            f"{expected} by plan"
        )
    if index not in plan.launches:
        plan.launches[index] = _moves(live, copies, lengths, flat)
    moves = plan.launches[index]
    if moves is not None and live.aligned and flat.data_ptr() % 16 == 0:
        arrived, written = torch.stack([moves.write(flat, live.addresses), moves.read(live.addresses)]).tolist()
        _compare(index, copies, lengths, digests, arrived, "arrived with")
        _compare(index, copies, lengths, digests, written, "reads back from the parameters as")
        return
    _compare(index, copies, lengths, digests, digest_of.digests(flat.split(lengths)), "arrived with")
    for copy in copies:
        copy.of(live.parameters[copy.tensor]).copy_(copy.of_flat(flat))
    again = torch.empty_like(flat)
    for copy in copies:
        copy.of_flat(again).copy_(copy.of(live.parameters[copy.tensor]))
    written = digest_of.digests(again.split(lengths))
    _compare(index, copies, lengths, digests, written, "reads back from the parameters as")


def _moves(live: Live, copies: Sequence[Copy], lengths: Sequence[int], flat: torch.Tensor) -> Any:
    """`copy_kernel.Moves` of a delivery; None where its copies must be done one by one."""
    if not copies or not digest_of.is_on_gpu(flat):
        return None
    try:
        from megatron_sglang import copy_kernel
    except ImportError:  # no Triton
        return None
    if any(live.parameters[copy.tensor].dtype != flat.dtype for copy in copies):
        return None
    if not copy_kernel.Moves.fits(copies, lengths, flat.element_size()):
        return None
    return copy_kernel.Moves(copies, lengths, live.numbers, flat.element_size(), flat.device)


def named(copies: Sequence[Copy]) -> str:
    """For errors: which parameters copies are for."""
    return f"for {first_of(list(dict.fromkeys(copy.tensor for copy in copies)))}"


def first_of(names: Sequence[str]) -> str:
    """The first four, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@torch.no_grad()
def finish(live: Live, plan: Plan) -> Live:
    """Fill what no trainer sends: padding, tied weights, and state that the model derives (DeepSeek's w_kc and w_vc).
    Returns where the parameters are now, because the model's hook that derives may have replaced some."""
    for copy, value in plan.constants:
        copy.of(live.parameters[copy.tensor]).fill_(value)
    tie_head(live.model, live.parameters)
    if derive(live.model):
        live = Live(live.model)
    recast(live.model, live.casts)
    return live


@torch.no_grad()
def prove(live: Live, plan: Plan) -> tuple[list[int], list[bool]]:
    """Digest of each parameter, and whether it holds nothing but finite numbers."""
    parameters = list(live.parameters.values())
    if plan.proof is None or not plan.proof.fits(parameters):
        plan.proof = digest_of.Finite(parameters)
    return plan.proof.of(parameters)


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """Sorted by name, so that a parameter has the same number in each version, whatever order the model has."""
    return {name: parameter.data for name, parameter in sorted(model.named_parameters(), key=lambda one: one[0])}


def _geometry(parameters: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(one.shape), one.stride(), one.dtype) for name, one in parameters.items()}


def _copy(row: Sequence[Any]) -> Copy:
    tensor, offset, flat, *geometry = row
    return Copy(tensor, offset, flat, *(tuple(numbers) for numbers in geometry))


def _compare(
    index: int, copies: Sequence[Copy], lengths: list[int], sent: list[int], found: Sequence[int], how: str
) -> None:
    """ValueError for the first segment whose digest is another; it names the parameters that the segment is for."""
    begin = 0
    for source, length in enumerate(lengths):
        if length and found[source] != sent[source]:
            within = [copy for copy in copies if copy.flat < begin + length and _end(copy) > begin]
            raise ValueError(
                f"delivery {index}, part of trainer rank {source}, {named(within)}: {how} digest "
                f"{found[source]:#x}, sent {sent[source]:#x}"
            )
        begin += length


def _end(copy: Copy) -> int:
    """Behind its last element in the flat buffer."""
    steps = zip(copy.sizes, copy.flat_strides, strict=True)
    return copy.flat + sum((size - 1) * stride for size, stride in steps) + 1
