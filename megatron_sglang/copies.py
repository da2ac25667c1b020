"""Many rectangles as few strided copies. Pure arithmetic.

A plan names one rectangle for each tensor of the Hugging Face model: 18,000 for a 30B MoE on each rank, of which the
experts' are evenly spaced in memory on both sides. Copied one by one they would cost more in kernel launches than in
bytes. Here evenly spaced ones become one `Copy` with more axes, and neighbours one longer run.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

type Run = tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]
"""(start, axes): start + k1 * step1 + k2 * step2 + ... for all 0 <= k < count; an axis is (count, step)."""

type Rectangle = tuple[str, int, int, int, int, int]
"""(tensor, offset, rows, cols, row stride, column stride), in elements."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of `tensor` from `offset` on, and of a flat segment from `flat` on, with the same `sizes`."""

    tensor: str
    offset: int
    flat: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    flat_strides: tuple[int, ...]

    def of(self, memory: Any) -> Any:
        """View of these elements of a torch tensor that begins where `tensor` does."""
        return memory.as_strided(self.sizes, self.strides, memory.storage_offset() + self.offset)

    def of_flat(self, segment: Any) -> Any:
        """View of these elements of the flat torch tensor."""
        return segment.as_strided(self.sizes, self.flat_strides, segment.storage_offset() + self.flat)


type _Axis = tuple[int, int, int]
"""(count, stride, stride in the flat segment)."""


def fold(rectangles: Iterable[Rectangle]) -> list[Copy]:
    """Copies that fill a flat segment with `rectangles`, one after the other, each row by row."""
    points: defaultdict[tuple[str, tuple[_Axis, ...]], list[Run]] = defaultdict(list)
    flat = 0
    for tensor, offset, rows, cols, row_stride, col_stride in rectangles:
        axes = _joined([(rows, row_stride, cols), (cols, col_stride, 1)])
        points[tensor, axes].append(((offset, flat), ()))
        flat += rows * cols
    copies = []
    for (tensor, axes), runs in points.items():
        for (offset, start), outer in progressions(runs, upwards=True):
            whole = _joined([*((count, *step) for count, step in outer), *axes])  # type: ignore[misc]
            sizes, strides, flat_strides = zip(*whole, strict=True)
            copies.append(Copy(tensor, offset, start, sizes, strides, flat_strides))
    return sorted(copies, key=lambda copy: copy.flat)


def _joined(axes: Sequence[_Axis]) -> tuple[_Axis, ...]:
    """The same elements with as few axes as possible, at least one."""
    found: list[_Axis] = []
    for count, stride, flat in (axis for axis in axes if axis[0] > 1):
        if found and found[-1][1:] == (count * stride, count * flat):
            found[-1] = (found[-1][0] * count, stride, flat)
        else:
            found.append((count, stride, flat))
    return tuple(found) or ((1, 1, 1),)


def progressions(points: list[Run], *, upwards: bool = False) -> list[Run]:
    """Merge runs with equal axes and evenly spaced starts into one with one more axis, until nothing merges.

    upwards: only steps of which every number is positive, as strides of memory that is written once must be.
    """
    while True:
        merged: list[Run] = []
        points.sort(key=lambda point: (point[1], point[0]))
        for axes, group in itertools.groupby(points, key=lambda point: point[1]):
            starts = [start for start, _ in group]
            at = 0
            while at < len(starts):
                end, step = _evenly_spaced(starts, at, upwards)
                merged.append((starts[at], axes if end - at == 1 else ((end - at, step), *axes)))
                at = end
        if len(merged) == len(points):
            return merged
        points = merged


def _evenly_spaced(starts: Sequence[tuple[int, ...]], at: int, upwards: bool) -> tuple[int, tuple[int, ...]]:
    """End and step of the longest evenly spaced run from `at` on."""
    step: tuple[int, ...] = ()
    end = at + 1
    while end < len(starts):
        delta = tuple(b - a for a, b in zip(starts[end - 1], starts[end], strict=True))
        if (step and delta != step) or (upwards and min(delta) <= 0):
            break
        step, end = delta, end + 1
    return end, step
