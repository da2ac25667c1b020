"""Numbers for the elements of checkpoint tensors, so that any copy can be followed by running it on the numbers.

An id is (tensor index + 1) << 44 | element; ZERO and UNDEFINED stand for what comes from no tensor. Torch only.
"""

from __future__ import annotations

import torch

_SHIFT = 44
ZERO = -1 << _SHIFT
UNDEFINED = -2 << _SHIFT
MAX_BOXES = 4096
"""More pieces than this are not worth the bookkeeping."""

type AffineBox = tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]
"""(start, size, id of the first element, id strides)."""


def name_ids(index: int, count: int) -> torch.Tensor:
    """[count] int64: the ids of tensor number `index`."""
    return torch.arange(count) + ((index + 1) << _SHIFT)


def source_of(element: int) -> tuple[int, int]:
    """(tensor index, element) of an id of a tensor."""
    return (element >> _SHIFT) - 1, element & ((1 << _SHIFT) - 1)


def affine_boxes(ids: torch.Tensor) -> list[AffineBox] | None:
    """Cut an array of ids into boxes, each of one tensor and with constant, non-negative strides; None if it takes more
    than MAX_BOXES."""
    done: list[AffineBox] = []
    todo = [((0,) * ids.dim(), ids)]
    while todo:
        start, part = todo.pop()
        if len(done) + len(todo) > MAX_BOXES:
            return None
        cut = _cut(part)
        if cut is None:
            first = int(part[(0,) * part.dim()])
            done.append((start, tuple(part.shape), first, tuple(_step(part, axis) for axis in range(part.dim()))))
            continue
        axis, at = cut
        rest = (*start[:axis], start[axis] + at, *start[axis + 1 :])
        todo += [(rest, part.narrow(axis, at, part.shape[axis] - at)), (start, part.narrow(axis, 0, at))]
    return done


def _step(part: torch.Tensor, axis: int) -> int:
    """Distance of the first two ids along `axis`."""
    if part.shape[axis] < 2:
        return 0
    pair = part[tuple(slice(2) if other == axis else 0 for other in range(part.dim()))]
    return int(pair[1] - pair[0])


def _cut(part: torch.Tensor) -> tuple[int, int] | None:
    """Where `part` first stops being affine: (axis, length of the good half)."""
    for axis in range(part.dim()):
        if part.shape[axis] < 2:
            continue
        step = _step(part, axis)
        if not 0 <= step < 1 << _SHIFT:
            return axis, 1
        bad = (part.diff(dim=axis) != step).movedim(axis, 0).reshape(part.shape[axis] - 1, -1).any(1)
        if bool(bad.any()):
            return axis, int(bad.nonzero()[0]) + 1
    return None
