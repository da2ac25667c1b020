"""The direct path inside an engine rank: parts of a flat buffer go straight into the parameters.

Torch only; called by `loader.py`. The plan is installed once and checked against the live parameters: every element
of each must be written exactly once, by a copy or a constant. A delivery is checked segment by segment before it
touches a parameter, and read back after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sglang.copies import Copy
from megatron_sglang.digests import digests as digests_of
from megatron_sglang.engine.live_model import refresh, tie_head


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes: `buckets` of copies out of each delivery, and constants (padding)."""

    buckets: tuple[tuple[Copy, ...], ...]
    constants: tuple[tuple[Copy, float], ...]


@torch.no_grad()
def check(model: Any, message: dict[str, Any]) -> Plan:
    """The plan in a message. ValueError if it does not write each element of each parameter exactly once."""
    plan = Plan(
        tuple(tuple(_copy(row) for row in bucket) for bucket in message["buckets"]),
        tuple((_copy(row), value) for row, value in message["constants"]),
    )
    parameters = _parameters(model)
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
def deliver(model: Any, plan: Plan, index: int, message: dict[str, Any], data: torch.Tensor) -> None:
    """Write delivery `index`. ValueError if its bytes are not those that were sent, or are not in the parameters."""
    flat = data.view(getattr(torch, message["dtype"]))
    copies = plan.buckets[index]
    lengths, digests = message["lengths"], message["digests"]
    expected = sum(math.prod(copy.sizes) for copy in copies)
    if sum(lengths) != flat.numel() or flat.numel() != expected:
        raise ValueError(f"delivery {index} has {flat.numel()} elements, expected {expected} by plan")
    _compare(index, flat, lengths, digests, "arrived with")
    parameters = _parameters(model)
    for copy in copies:
        copy.of(parameters[copy.tensor]).copy_(copy.of_flat(flat))
    written = torch.empty_like(flat)
    for copy in copies:
        copy.of_flat(written).copy_(copy.of(parameters[copy.tensor]))
    _compare(index, written, lengths, digests, "reads back from the parameters as")


@torch.no_grad()
def finish(model: Any, plan: Plan) -> None:
    """What no trainer sends: padding, tied weights, and state that the model derives (DeepSeek's w_kc and w_vc)."""
    parameters = _parameters(model)
    for copy, value in plan.constants:
        copy.of(parameters[copy.tensor]).fill_(value)
    tie_head(model)
    refresh(model)


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _copy(row: Sequence[Any]) -> Copy:
    tensor, offset, flat, *geometry = row
    return Copy(tensor, offset, flat, *(tuple(numbers) for numbers in geometry))


def _compare(index: int, flat: torch.Tensor, lengths: list[int], digests: list[int], how: str) -> None:
    found = digests_of(flat.split(lengths))
    for source, (length, got, sent) in enumerate(zip(lengths, found, digests, strict=True)):
        if length and got != sent:
            raise ValueError(f"delivery {index}, part of trainer rank {source}, {how} digest {got:#x}, sent {sent:#x}")
