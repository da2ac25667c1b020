"""Proof, inside one engine rank, that writes as recorded do exactly what the model's own loader does. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_sglang.digests import digest
from megatron_sglang.engine.live_model import poison, refresh, tie_head
from megatron_sglang.engine.trace_loader import trace
from megatron_sglang.layout import Write

Tensors = Mapping[str, torch.Tensor]


@torch.no_grad()
def self_test(model: torch.nn.Module, tensors: Tensors, rank: int) -> dict[str, Any]:
    """Load `tensors` (HF tensors, all or some, values that differ) through the loader and by replaying its trace; same
    bits in every parameter and in everything derived from them. Two sources exchanged must be noticed. `ValueError`
    otherwise.

    The model holds `tensors` afterwards, and NaN in what they do not fill.
    """
    layout = trace(model, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, rank)
    _poison(model)
    _load(model, tensors)
    expected = _digests(model)
    derived = _poison_derived(model, expected)

    if layout.generic:
        _load(model, {name: tensors[name] for name in layout.generic})
    replay(model, layout.writes, tensors)
    unrefreshed = [name for name in derived if _digests(model)[name] != expected[name]]
    refresh(model)
    wrong = [name for name, value in _digests(model).items() if value != expected[name]]
    if wrong:
        raise ValueError(
            f"the layout of rank {rank} differs from the loader in {len(wrong)} of {len(expected)} tensors, first "
            f"{wrong[0]}; do not use it: publish by the generic path"
        )
    exchanged = _exchange(layout.writes, tensors)
    if exchanged is not None:
        replay(model, exchanged, tensors)
        if all(value == expected[name] for name, value in _digests(model).items()):
            raise ValueError(f"the self-test of rank {rank} is blind: it did not notice two exchanged tensors")
        replay(model, layout.writes, tensors)
        refresh(model)
    return {
        "tensors": len(expected),
        "writes": len(layout.writes),
        "generic": len(layout.generic),
        "control": exchanged is not None,
        "refreshed": len(unrefreshed),
    }


@torch.no_grad()
def replay(model: torch.nn.Module, writes: Iterable[Write], tensors: Tensors) -> None:
    """Do the writes, from contiguous HF tensors."""
    parameters = dict(model.named_parameters())
    for write in writes:
        parameter = parameters[write.param].data
        target = parameter.as_strided(write.size, write.strides, parameter.storage_offset() + write.offset)
        if write.source is None:
            assert write.const is not None, "a write has a source or a const"
            target.fill_(write.const)
        else:
            target.copy_(_source(write, tensors))


def _source(write: Write, tensors: Tensors) -> torch.Tensor:
    assert write.source is not None
    tensor = tensors[write.source].contiguous()
    return tensor.as_strided(write.size, write.source_strides, tensor.storage_offset() + write.source_offset)


def _load(model: Any, tensors: Tensors) -> None:
    """Load by the model's loader; copies, because some loaders write into what they are given."""
    model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    tie_head(model)


def _poison(model: torch.nn.Module) -> None:
    """Overwrite parameters of every dtype: with NaN, or where the dtype has none with a byte of no meaning."""
    poison(model)
    for parameter in model.parameters():
        if not (parameter.dtype.is_floating_point and parameter.element_size() > 1):
            parameter.data.view(torch.uint8).fill_(77)


def _poison_derived(model: torch.nn.Module, expected: Mapping[str, int]) -> list[str]:
    """Poison the parameters and what the model derives from them; the names of the derived tensors."""
    _poison(model)
    poisoned = _digests(model)
    refresh(model)
    return [name for name, value in _digests(model).items() if value not in (poisoned[name], expected[name])]


def _digests(model: torch.nn.Module) -> dict[str, int]:
    """Digests of parameters, buffers and tensors that are plain attributes of modules."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found.setdefault(f"{prefix}.{name}", value)
    return {name: digest(tensor) for name, tensor in found.items()}


def _exchange(writes: Iterable[Write], tensors: Tensors) -> list[Write] | None:
    """The writes with the sources of two of them exchanged whose contents differ; None if there are none."""
    changed, seen = list(writes), {}
    for at, write in enumerate(changed):
        if write.source is None:
            continue
        first = seen.setdefault((write.size, write.source_strides, write.source_offset), at)
        other = replace(changed[first], source=write.source)
        if not torch.equal(_source(changed[first], tensors), _source(write, tensors)):
            changed[at], changed[first] = replace(write, source=changed[first].source), other
            return changed
    return None
