"""The direct path inside an engine rank: rectangles of a flat buffer go straight into the parameters.

Torch only; called by `loader.py`. The plan is installed once and checked against the live parameters: every element
of each must be written exactly once, by a rectangle or a constant. A delivery is checked segment by segment before it
touches a parameter, and read back after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sglang.buckets import digest
from megatron_sglang.engine.live_model import refresh, tie_head


@dataclass(frozen=True, slots=True)
class Rectangle:
    """`rows` x `cols` elements of parameter `name` from element `offset` on."""

    name: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    def view(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = parameters[self.name]
        at = parameter.storage_offset() + self.offset
        return parameter.as_strided((self.rows, self.cols), (self.row_stride, self.col_stride), at)


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes: `buckets` of rectangles in the order of arrival, and constants (padding)."""

    buckets: tuple[tuple[Rectangle, ...], ...]
    constants: tuple[tuple[Rectangle, float], ...]


@torch.no_grad()
def check(model: Any, message: dict[str, Any]) -> Plan:
    """The plan in a message. ValueError if it does not write each element of each parameter exactly once."""
    plan = Plan(
        tuple(tuple(Rectangle(*fields) for fields in bucket) for bucket in message["buckets"]),
        tuple((Rectangle(*fields), value) for fields, value in message["constants"]),
    )
    parameters = _parameters(model)
    everything = [*(rectangle for bucket in plan.buckets for rectangle in bucket), *(r for r, _ in plan.constants)]
    by_name: dict[str, list[Rectangle]] = {name: [] for name in parameters}
    for rectangle in everything:
        if rectangle.name not in by_name:
            raise ValueError(f"the plan writes to {rectangle.name}, which is no parameter of this model")
        by_name[rectangle.name].append(rectangle)
    for name, rectangles in by_name.items():
        counts = torch.zeros_like(parameters[name], dtype=torch.uint8)
        for rectangle in rectangles:
            rectangle.view({name: counts}).add_(1)
        if not bool((counts == 1).all()):
            missing, twice = int((counts == 0).sum()), int((counts > 1).sum())
            raise ValueError(f"the plan leaves {missing} elements of {name} unwritten and writes {twice} repeatedly")
    return plan


@torch.no_grad()
def deliver(model: Any, plan: Plan, index: int, message: dict[str, Any], data: torch.Tensor) -> None:
    """Write delivery `index`. ValueError if its bytes are not those that were sent, or are not in the parameters."""
    flat = data.view(getattr(torch, message["dtype"]))
    rectangles = plan.buckets[index]
    lengths, digests = message["lengths"], message["digests"]
    expected = sum(rectangle.rows * rectangle.cols for rectangle in rectangles)
    if sum(lengths) != flat.numel() or flat.numel() != expected:
        raise ValueError(f"delivery {index} has {flat.numel()} elements, expected {expected} by plan")
    _compare(index, flat, lengths, digests, "arrived with")
    parameters = _parameters(model)
    for rectangle, part in _parts(rectangles, flat):
        rectangle.view(parameters).copy_(part)
    written = torch.empty_like(flat)
    for rectangle, part in _parts(rectangles, written):
        part.copy_(rectangle.view(parameters))
    _compare(index, written, lengths, digests, "reads back from the parameters as")


@torch.no_grad()
def finish(model: Any, plan: Plan) -> None:
    """What no trainer sends: padding, tied weights, and state that the model derives (DeepSeek's w_kc and w_vc)."""
    parameters = _parameters(model)
    for rectangle, value in plan.constants:
        rectangle.view(parameters).fill_(value)
    tie_head(model)
    refresh(model)


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _parts(rectangles: Sequence[Rectangle], flat: torch.Tensor) -> Iterator[tuple[Rectangle, torch.Tensor]]:
    sizes = [rectangle.rows * rectangle.cols for rectangle in rectangles]
    for rectangle, part in zip(rectangles, flat.split(sizes), strict=True):
        yield rectangle, part.view(rectangle.rows, rectangle.cols)


def _compare(index: int, flat: torch.Tensor, lengths: list[int], digests: list[int], how: str) -> None:
    for source, (part, sent) in enumerate(zip(flat.split(lengths), digests, strict=True)):
        if part.numel() and (found := digest(part)) != sent:
            raise ValueError(
                f"delivery {index}, part of trainer rank {source}, {how} digest {found:#x}, sent {sent:#x}"
            )
