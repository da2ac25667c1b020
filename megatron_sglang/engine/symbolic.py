"""Tensors without memory that know what their elements are, and what the tracer must know of torch's operations.

Torch only. See `trace_loader.py` for what they are good for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = {aten.clone, aten._to_copy}
MOVES = COPIES | {
    aten.cat, aten.stack, aten.index_select, aten.index, aten.constant_pad_nd,
    aten.roll, aten.flip, aten.repeat, aten.permute_copy, aten._reshape_copy, aten.repeat_interleave,
}  # fmt: skip
"""Operations that move elements and change none: they can be run on element numbers instead."""
PLACEMENT = ("dtype", "device", "layout", "pin_memory", "memory_format")
UNDEFINED_FACTORIES = {aten.empty_like, aten.new_empty, aten.new_empty_strided}
ZERO_FACTORIES = {aten.zeros_like, aten.new_zeros}
GEOMETRY_ONLY = UNDEFINED_FACTORIES | ZERO_FACTORIES | {aten.ones_like, aten.new_ones, aten.new_full, aten.full_like}
"""Operations that look at a tensor's geometry only."""


class Handler(Protocol):
    """What a `Symbolic` needs of its tracer."""

    device: torch.device

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any: ...


@dataclass(slots=True, eq=False)
class Memory:
    """What the elements of a tensor without memory are. `elements` gives their ids, [n] int64, or is None when they
    were computed. `name` is set while it is nothing but the elements of that HF tensor from `shift` on, in order."""

    elements: Callable[[], torch.Tensor] | None
    sources: frozenset[str]
    dtypes: frozenset[torch.dtype]
    how: str
    name: str = ""
    shift: int = 0

    def overwrite(self, view: torch.Tensor, value: Callable[[], torch.Tensor] | int | None, how: str) -> None:
        """Elements in `view` (a meta tensor) become `value`: ids, one id, or (None) something unknown."""
        base, self.name = self.elements, ""
        if base is None or value is None:
            self.elements, self.how = None, how
            return

        def elements() -> torch.Tensor:
            ids = base().clone()
            target = ids.as_strided(view.size(), view.stride(), view.storage_offset())
            target.copy_(value()) if callable(value) else target.fill_(value)
            return ids

        self.elements = elements


class Symbolic(torch.Tensor):
    """A tensor without memory: `meta` has its geometry, `memory` says what its elements are."""

    meta: torch.Tensor
    memory: Memory
    tracer: Handler

    @staticmethod
    def __new__(cls, meta: torch.Tensor, memory: Memory, tracer: Handler) -> Symbolic:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=tracer.device,
        )
        made.meta, made.memory, made.tracer = meta, memory, tracer
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached only where the mode is not, in threads that the loader starts."""
        some = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Symbolic))
        return some.tracer.handle(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Symbolic({self.memory.how}, {tuple(self.shape)})"

    def ids(self) -> Callable[[], torch.Tensor] | None:
        """How to get the ids of its elements, in its shape, as they are now."""
        elements, meta = self.memory.elements, self.meta
        if elements is None:
            return None
        return lambda: elements().as_strided(meta.size(), meta.stride(), meta.storage_offset())


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def written_tensors(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def exact(path: set[torch.dtype], sources: set[torch.dtype], target: torch.dtype) -> bool:
    """Is a copy into `target` equal to the one that went through all dtypes of `path`? Quantising is never."""
    if not all(source == target or (target.is_floating_point and target.itemsize > 1) for source in sources):
        return False
    wide = (torch.promote_types(step, source) == step for step in path - sources - {target} for source in sources)
    return all(wide)


def same_memory(one: torch.Tensor, other: Any) -> bool:
    """Are both the same elements of the same live memory?"""
    if not isinstance(other, torch.Tensor) or isinstance(other, Symbolic):
        return False
    storages = one.untyped_storage()._cdata, other.untyped_storage()._cdata
    geometry = [(t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return storages[0] == storages[1] and geometry[0] == geometry[1]


def as_stored(ids: Callable[[], torch.Tensor], size: torch.Size, strides: tuple[int, ...]) -> torch.Tensor:
    """[n] ids in the order of memory of a tensor with that geometry."""
    stored = torch.empty_strided(size, strides, dtype=torch.int64)
    stored.copy_(ids())
    return stored.as_strided((stored.numel(),), (1,))


def to_meta(value: Any) -> Any:
    if isinstance(value, Symbolic):
        return value.meta
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
