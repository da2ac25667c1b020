"""Where every element of an engine rank's parameters comes from. Pure records: no torch, no framework.

`engine/trace_loader.py` makes one `RankLayout` per engine rank; whoever sends slices plans with them.

    Write("layers.0.gate_up.weight", 512, (32, 16), (16, 1), "layers.0.up_proj.weight", 1024, (16, 1))

means: of the parameter's memory, the box of 32 x 16 elements from element 512 on is filled from the contiguous
checkpoint tensor `up_proj`, from its element 1024 on. Offsets and strides count elements. Thousands of writes that
differ by arithmetic progressions (layers, experts) fold into a few `Fold`s, which is also how a layout travels.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from megatron_sglang.copies import Run, progressions

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.)")
_MARK = "#"


@dataclass(frozen=True, slots=True)
class Param:
    """Geometry of one parameter of one rank; `dtype` as in "float32"."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Write:
    """param.as_strided(size, strides, offset) <- source.as_strided(size, source_strides, source_offset), or <- const.

    `offset` counts from the parameter's first element; `source` is None for a const. `cast` is the parameter's dtype
    where it is not that of the checkpoint tensor.
    """

    param: str
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    source: str | None = None
    source_offset: int = 0
    source_strides: tuple[int, ...] = ()
    const: float | None = None
    cast: str | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.const is None):
            raise ValueError(f"write to {self.param} has source {self.source} and const {self.const}, expected one")

    @property
    def elements(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class Box:
    """Index ranges [start, start + size) of a parameter."""

    param: str
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    def __str__(self) -> str:
        ranges = ", ".join(f"{start}:{start + size}" for start, size in zip(self.start, self.size, strict=True))
        return f"{self.param}[{ranges}]"


@dataclass(frozen=True, slots=True)
class Fold:
    """Writes in arithmetic progression. `pattern` has "#" for the numbers in its names and no offsets; the numbers of
    param, then of source, then offset and source_offset are `start` + sum of k * step over `axes` (count, step)."""

    pattern: Write
    start: tuple[int, ...]
    axes: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class RankLayout:
    """What one engine rank's loader does with the checkpoint. Only if `direct` may `writes` replace the loader."""

    rank: int
    params: Mapping[str, Param]
    writes: tuple[Write, ...]
    """In any order: none of them overlap where `overlapping` is empty."""
    generic: Mapping[str, str] = field(default_factory=dict)
    """HF name -> why it must go through the model's own loader. None of them appears in `writes`."""
    derived: tuple[str, ...] = ()
    """Parameters that the loader reads to compute other state: run the model's hook after they were written."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further name of a parameter -> the one used here."""
    uncovered: tuple[Box, ...] = ()
    overlapping: tuple[Box, ...] = ()

    @property
    def direct(self) -> bool:
        """True if `writes` fill every element of every parameter exactly once."""
        return not (self.generic or self.uncovered or self.overlapping)

    def to_json(self) -> str:
        return json.dumps(
            {
                "rank": self.rank,
                "params": {name: astuple(param) for name, param in self.params.items()},
                "folds": [astuple(part) for part in fold(self.writes)],
                "generic": dict(self.generic),
                "derived": self.derived,
                "aliases": dict(self.aliases),
                "uncovered": [astuple(box) for box in self.uncovered],
                "overlapping": [astuple(box) for box in self.overlapping],
            }
        )

    @staticmethod
    def from_json(text: str) -> RankLayout:
        fields = {name: _tuples(value) for name, value in json.loads(text).items()}
        folds = (Fold(Write(*pattern), start, axes) for pattern, start, axes in fields.pop("folds"))
        boxes = {name: tuple(Box(*box) for box in fields.pop(name)) for name in ("uncovered", "overlapping")}
        params = {name: Param(*param) for name, param in fields.pop("params").items()}
        return RankLayout(params=params, writes=tuple(unfold(folds)), **boxes, **fields)


def problems(layouts: Sequence[RankLayout], names: Iterable[str]) -> list[str]:
    """Why these layouts cannot replace the engine's loader, each said once; empty if they can. names: all HF names.

    A loader skips names it does not know without a word, and under EP most names are rightly unused by one rank; so a
    name must be used by at least one of them.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for layout in layouts:
        for name, reason in layout.generic.items():
            found[f"{name} needs the model's own loader: {reason}"].append(layout.rank)
        for box in layout.uncovered:
            found[f"{box} comes from no tensor"].append(layout.rank)
        for box in layout.overlapping:
            found[f"{box} is written more than once"].append(layout.rank)
    used = {write.source for layout in layouts for write in layout.writes}
    for name in sorted(set(names) - used.union(*(layout.generic for layout in layouts))):
        found[f"{name} is used by no rank: the loader does not know it"] += [layout.rank for layout in layouts]
    return [f"engine rank {', '.join(map(str, ranks))}: {text}" for text, ranks in found.items()]


# ---- coverage ----


@dataclass(frozen=True, slots=True)
class Coverage:
    """What writes leave out of the parameters, and what they write more than once."""

    uncovered: tuple[Box, ...]
    overlapping: tuple[Box, ...]
    irregular: frozenset[Write]
    """Writes that are no boxes of their parameter (a diagonal, say); they count as covering nothing."""


def coverage(params: Mapping[str, Param], writes: Iterable[Write]) -> Coverage:
    """Find out what is not written, and what twice; exactly, by cutting the box of each write out of what is left."""
    by_param: dict[str, list[Write]] = {name: [] for name in params}
    for write in writes:
        by_param[write.param].append(write)
    uncovered: list[Box] = []
    overlapping: list[Box] = []
    irregular: set[Write] = set()
    for name, param in params.items():
        zero = (0,) * len(param.shape)
        left = [Box(name, zero, param.shape)] if math.prod(param.shape) else []
        # In order of memory what is left stays one or two boxes, however many writes there are.
        for write in sorted(by_param[name], key=lambda write: write.offset):
            boxes = boxes_of(write, param)
            if boxes is None:
                irregular.add(write)
                continue
            for box in boxes:
                overlapping += _without([box], left)
                left = _without(left, [box])
        uncovered += left
    return Coverage(tuple(uncovered), tuple(overlapping), frozenset(irregular))


def boxes_of(write: Write, param: Param) -> list[Box] | None:
    """The index boxes that a write fills, one for each step where it leaves gaps; None if it is not made of boxes."""
    axes = sorted((a for a, n in enumerate(param.shape) if n > 1), key=lambda a: -param.strides[a])
    start, rest = [0] * len(param.shape), write.offset
    for axis in axes:
        start[axis], rest = divmod(rest, param.strides[axis])
    walked: dict[int, tuple[int, int]] = {}
    todo = [(count, stride) for count, stride in zip(write.size, write.strides, strict=True) if count > 1]
    while todo:
        count, stride = todo.pop()
        axis = next((a for a in axes if 0 < param.strides[a] <= stride), None)
        if axis is None or axis in walked or stride % param.strides[axis]:
            return None
        step = stride // param.strides[axis]
        if start[axis] + (count - 1) * step < param.shape[axis]:
            walked[axis] = (count, step)
        elif step == 1 and start[axis] == 0 and count % param.shape[axis] == 0:
            # A flattened view: it walks this axis to its end and goes on in the next.
            walked[axis] = (param.shape[axis], 1)
            todo.append((count // param.shape[axis], stride * param.shape[axis]))
        else:
            return None
    if rest or any(at >= extent for at, extent in zip(start, param.shape, strict=True)):
        return None
    size = tuple(walked[axis][0] if axis in walked and walked[axis][1] == 1 else 1 for axis in range(len(start)))
    steps = [
        range(at, at + walked[a][0] * walked[a][1], walked[a][1]) if a in walked and walked[a][1] > 1 else [at]
        for a, at in enumerate(start)
    ]
    return [Box(write.param, corner, size) for corner in itertools.product(*steps)]


def _without(boxes: Iterable[Box], holes: Iterable[Box]) -> list[Box]:
    """`boxes` less `holes`, all of one parameter."""
    left = list(boxes)
    for hole in holes:
        left = [part for box in left for part in _cut(box, hole)]
    return left


def _cut(box: Box, hole: Box) -> Iterator[Box]:
    start, size = list(box.start), list(box.size)
    low = [max(a, b) for a, b in zip(box.start, hole.start, strict=True)]
    high = [min(a + m, b + n) for a, m, b, n in zip(box.start, box.size, hole.start, hole.size, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        yield box
        return
    for axis in range(len(start)):
        for begin, end in ((start[axis], low[axis]), (high[axis], start[axis] + size[axis])):
            if begin < end:
                corner, extent = start.copy(), size.copy()
                corner[axis], extent[axis] = begin, end - begin
                yield Box(box.param, tuple(corner), tuple(extent))
        start[axis], size[axis] = low[axis], high[axis] - low[axis]


def samples_of(names: Iterable[str]) -> list[list[str]]:
    """HF tensors that stand for a model in a self-test, in groups that a device has room for: each that is outside the
    layers by itself, the first and the last layer, and of a layer's experts the first and the last."""
    layers: defaultdict[int, list[str]] = defaultdict(list)
    groups = []
    for name in names:
        if found := re.search(r"\.layers\.(\d+)\.", name):
            layers[int(found[1])].append(name)
        else:
            groups.append([name])
    for layer in sorted({min(layers, default=0), max(layers, default=0)} & layers.keys()):
        experts = {name: int(found[1]) for name in layers[layer] if (found := re.search(r"\.experts\.(\d+)\.", name))}
        ends = {min(experts.values(), default=0), max(experts.values(), default=0)}
        groups.append([name for name in layers[layer] if experts.get(name, 0) in ends])
    return groups


# ---- folding ----


def fold(writes: Iterable[Write]) -> list[Fold]:
    """Lossless but for the order, which means nothing where writes do not overlap. Inverse of `unfold`."""
    groups: dict[Write, list[Run]] = defaultdict(list)
    for write in writes:
        param, param_numbers = _split(write.param)
        source, source_numbers = _split(write.source or "")
        pattern = replace(write, param=param, offset=0, source=write.source and source, source_offset=0)
        numbers = (*param_numbers, *source_numbers, write.offset, write.source_offset)
        groups[pattern].append((numbers, ()))
    return [Fold(pattern, *run) for pattern, points in groups.items() for run in progressions(points)]


def unfold(folds: Iterable[Fold]) -> Iterator[Write]:
    for part in folds:
        names = part.pattern.param, part.pattern.source or ""
        first = names[0].count(_MARK)
        for counts in itertools.product(*(range(count) for count, _ in part.axes)):
            numbers = list(part.start)
            for k, (_, step) in zip(counts, part.axes, strict=True):
                numbers = [number + k * more for number, more in zip(numbers, step, strict=True)]
            *in_names, offset, source_offset = numbers
            param, source = _join(names[0], in_names[:first]), _join(names[1], in_names[first:])
            yield replace(
                part.pattern,
                param=param,
                offset=offset,
                source=part.pattern.source and source,
                source_offset=source_offset,
            )


def _split(name: str) -> tuple[str, list[int]]:
    if _MARK in name:
        raise ValueError(f"tensor name {name!r} contains {_MARK!r}, which folding uses itself")
    return _NUMBER.sub(_MARK, name), [int(number) for number in _NUMBER.findall(name)]


def _join(pattern: str, numbers: Collection[int]) -> str:
    rest = iter(numbers)
    return re.sub(_MARK, lambda _: str(next(rest)), pattern)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
