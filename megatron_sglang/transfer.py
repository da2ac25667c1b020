"""The direct path's plan: which trainer rank sends which rectangle of which tensor to which engine rank. Pure.

Two descriptions of the same Hugging Face tensors meet here, and their intersections travel. The plan depends on
placement alone, so it is made once and used for every weight version. The words of the direct path:

    shard      where a rectangle of an HF tensor lies in a trainer rank's merged weights (`weights/shards.py`)
    slot       where a rectangle of an HF tensor belongs in an engine rank's parameters, learned by tracing the engine's
               own loader (`layout.py`)
    piece      what a shard and a slot have in common: the rectangle that travels
    bucket     pieces that travel together
    host       the trainer rank that hands over to an engine rank (`host_of`); it may serve several, in rounds
    delivery   all that one engine rank gets of a bucket: a flat segment from each trainer rank, in rank order

All tensors are seen as matrices [rows, cols]; one with a single dimension has one column. Offsets and strides count
elements.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from megatron_sglang.buckets import fusion_key, transfer_order
from megatron_sglang.copies import Copy, Rectangle, fold
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.layout import RankLayout, Write

BUFFERS = 1
"""Send buffers, and receive buffers of each engine rank. With two of each, a bucket is merged while the one before it
is exchanged, and exchanged while the engine takes the one before that; with one of each a bucket may be twice as large
in the same memory, and is merged while the engine takes the one before. Measured, the larger bucket wins by a fifth:
trainer and engine take turns on a GPU anyhow, and each bucket costs a turn (docs/weight_sync.md)."""

LITTLE = 4
"""Where less than 1/LITTLE of a bucket is left, a layer that fits into a bucket begins the next one, uncut."""

CHUNK_BYTES = 32 << 20
"""Without a kernel of ours, each of a merge's half dozen fp32 temporaries holds at most this much, or one expert."""


@dataclass(frozen=True, slots=True)
class Box:
    """Rows [row, row + rows) and columns [col, col + cols) of a tensor."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        return self.rows * self.cols

    def meet(self, other: Box) -> Box | None:
        """The common part, None where there is none."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Box(row, col, rows, cols) if rows > 0 and cols > 0 else None


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle in memory: element (r, c) of it is at offset + r * row_stride + c * col_stride of `tensor`."""

    tensor: str
    offset: int
    row_stride: int
    col_stride: int

    def part(self, whole: Box, box: Box) -> Place:
        """The place of `box`, a part of `whole`, if `whole` lies here."""
        down, right = box.row - whole.row, box.col - whole.col
        offset = self.offset + down * self.row_stride + right * self.col_stride
        return Place(self.tensor, offset, self.row_stride, self.col_stride)


@dataclass(frozen=True, slots=True)
class Region:
    """`box` of HF tensor `name` at `place` of rank `rank`: a shard if it is a trainer's, a slot if an engine's."""

    rank: int
    name: str
    box: Box
    place: Place


def row_of(region: Region) -> list[Any]:
    """JSON values of a region, to be sent to another rank."""
    return [region.rank, region.name, astuple(region.box), astuple(region.place)]


def region_from(row: Sequence[Any]) -> Region:
    """Inverse of `row_of`."""
    return Region(row[0], row[1], Box(*row[2]), Place(*row[3]))


@dataclass(frozen=True, slots=True)
class Piece:
    """What travels: a rectangle of `rows` x `cols` elements of `name`."""

    name: str
    source: int
    target: int
    rows: int
    cols: int
    here: Place
    """In the source's merged weights."""
    there: Place
    """In the target's parameters."""

    @property
    def size(self) -> int:
        return self.rows * self.cols


def slots_of(layout: RankLayout, shapes: Mapping[str, tuple[int, ...]]) -> list[Region]:
    """What one engine rank needs. shapes: of the HF tensors.

    Raises `WeightSyncError` for a write that is not a rectangle of its tensor.
    """
    return [_slot(layout.rank, write, shapes[write.source]) for write in layout.writes if write.source is not None]


def _slot(rank: int, write: Write, shape: tuple[int, ...]) -> Region:
    assert write.source is not None
    cols = shape[1] if len(shape) == 2 else 1
    extents, strides = {"row": 1, "col": 1}, {"row": 0, "col": 0}
    for count, from_stride, to_stride in zip(write.size, write.source_strides, write.strides, strict=True):
        axis = "row" if from_stride == cols else "col" if from_stride == 1 else None
        if count == 1:
            continue
        if axis is None or extents[axis] > 1 or len(shape) > 2:
            raise WeightSyncError(
                f"direct path: what engine rank {rank} takes of {write.source} {shape} into {write.param} is no "
                "rectangle of rows and columns; use the generic path"
            )
        extents[axis], strides[axis] = count, to_stride
    row, col = divmod(write.source_offset, cols)
    place = Place(write.param, write.offset, strides["row"], strides["col"])
    return Region(rank, write.source, Box(row, col, extents["row"], extents["col"]), place)


def host_of(target: int, hosts: int) -> int:
    """The trainer rank that hands over to engine rank `target`, of the first `hosts` ranks: those that can reach it."""
    return target % hosts


def make_plan(
    shards: Iterable[Region], slots: Sequence[Region], hosts: int | None = None, machines: Sequence[int] = ()
) -> list[Piece]:
    """Pieces that bring every element of every slot from exactly one source; in `transfer_order`, then by target.

    Where several trainer ranks hold a shard, the target's own host sends it if it is one of them (nothing travels
    between GPUs then); else the rank that sends least so far, of those on the host's machine if there are any.
    hosts: how many trainer ranks hand over (`host_of`); None: engine rank k has trainer rank k. machines: the number of
    each trainer rank's machine; empty: there is only one. Raises `WeightSyncError` for a slot of which an element is
    held by no trainer rank, or by shards that overlap.
    """
    holders: defaultdict[str, defaultdict[Box, dict[int, Place]]] = defaultdict(lambda: defaultdict(dict))
    for shard in shards:
        holders[shard.name][shard.box][shard.rank] = shard.place
    sent: defaultdict[int, int] = defaultdict(int)
    pieces: list[Piece] = []
    for slot in sorted(slots, key=lambda slot: (transfer_order(slot.name), slot.rank)):
        covered = 0
        for box, replicas in holders[slot.name].items():
            common = box.meet(slot.box)
            if common is None:
                continue
            host = slot.rank if hosts is None else host_of(slot.rank, hosts)
            near = [rank for rank in replicas if machines and machines[rank] == machines[host]]
            source = host if host in replicas else min(near or replicas, key=lambda rank: (sent[rank], rank))
            here, there = replicas[source].part(box, common), slot.place.part(slot.box, common)
            pieces.append(Piece(slot.name, source, slot.rank, common.rows, common.cols, here, there))
            sent[source] += common.size if source != host else 0
            covered += common.size
        if covered != slot.box.size:
            raise WeightSyncError(
                f"direct path: {covered} of the {slot.box.size} elements of {slot.name} that engine rank {slot.rank} "
                f"needs in {slot.place.tensor} are held by trainer ranks; expected each once; use the generic path"
            )
    return pieces


def cut(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Cut the plan into buckets, of each of which no target receives more than `limit` elements (or one row, if that is
    more).

    A decoder layer (with pipeline stages: one layer of each) stays in one bucket if it fits there, so that its grouped
    experts are merged once. One that does not fit is spread over several buckets evenly, so that in each of them all
    ranks that send and receive of this layer have equally much to do.
    """
    buckets: list[list[Piece]] = [[]]
    filled: Counter[int] = Counter()

    def place(unit: list[Piece]) -> None:
        needed = _received(unit)
        if any(filled[target] and filled[target] + size > limit for target, size in needed.items()):
            buckets.append([])
            filled.clear()
        buckets[-1] += unit
        filled.update(needed)

    for layer in _layers(pieces):
        whole, room = max(_received(layer).values()), limit - max(filled.values(), default=0)
        if whole <= room or (whole <= limit and room * LITTLE < limit):
            place(layer)
            continue
        for unit in (part for group in _interleaved(layer) for part in _by_rows(group, limit)):
            place(unit)
    return [bucket for bucket in buckets if bucket]


def _layers(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """What is outside the layers, then the first layers of all pipeline stages together, then the second ones, and so
    on. Layer by layer, the ranks of one stage would send everything while all others wait, and need send buffers as
    much larger. Stages are told apart by their senders: layers of one stage have some in common, those of two have
    none."""
    stages: list[tuple[set[int], list[list[Piece]]]] = []
    for number, found in itertools.groupby(pieces, key=lambda piece: transfer_order(piece.name)[0]):
        layer = list(found)
        if number < 0:
            yield layer
            continue
        senders, layers = {piece.source for piece in layer}, [layer]
        for stage in [stage for stage in stages if stage[0] & senders]:
            stages.remove(stage)
            senders, layers = stage[0] | senders, stage[1] + layers
        stages.append((senders, layers))
    for together in itertools.zip_longest(*(layers for _, layers in stages), fillvalue=[]):
        yield [piece for layer in together for piece in layer]


def _interleaved(layer: Iterable[Piece]) -> list[list[Piece]]:
    """The layer's pieces by group of tensors that fuse (the trainer merges a group in one go), in an order that spreads
    the groups which the same ranks send to the same ranks evenly over the layer."""
    groups: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in layer:
        groups[fusion_key(piece.name)].append(piece)
    alike: defaultdict[tuple[frozenset[int], frozenset[int]], list[str]] = defaultdict(list)
    for key, found in groups.items():
        alike[frozenset(piece.source for piece in found), frozenset(piece.target for piece in found)].append(key)
    places: dict[str, float] = {}
    for keys in alike.values():
        sizes = [sum(piece.size for piece in groups[key]) for key in keys]
        ends = itertools.accumulate(sizes)
        # A group's place in the order, 0 to 1: the share of its kind's elements that comes before its middle.
        places |= {key: (end - size / 2) / sum(sizes) for key, size, end in zip(keys, sizes, ends, strict=True)}
    return [groups[key] for key in sorted(groups, key=lambda key: (places[key], key))]


def _by_rows(group: list[Piece], limit: int) -> list[list[Piece]]:
    """These pieces, all of them cut by their rows into so many parts that no target gets more than the limit in one.
    There are no more parts than rows: of many pieces of few rows a target may get more."""
    most = max(piece.rows for piece in group)
    parts = -(-max(_received(group).values()) // limit)
    while True:
        parts = min(parts, most)
        found = [[part for piece in group if (part := _rows_of(piece, number, parts)).rows] for number in range(parts)]
        if parts == most or max(max(_received(part).values()) for part in found) <= limit:
            return found
        parts += 1  # rows are not cut, so that parts are not equally long


def _rows_of(piece: Piece, number: int, parts: int) -> Piece:
    """Part `number` of so many; empty where there are fewer rows."""
    first, end = piece.rows * number // parts, piece.rows * (number + 1) // parts
    here = replace(piece.here, offset=piece.here.offset + first * piece.here.row_stride)
    there = replace(piece.there, offset=piece.there.offset + first * piece.there.row_stride)
    return replace(piece, rows=end - first, here=here, there=there)


def _received(pieces: Iterable[Piece]) -> Counter[int]:
    """Elements by target."""
    needed: Counter[int] = Counter()
    for piece in pieces:
        needed[piece.target] += piece.size
    return needed


def traffic(pieces: Iterable[Piece], itemsize: int) -> dict[tuple[int, int], int]:
    """Bytes by (source, target) of one weight version."""
    pairs: defaultdict[tuple[int, int], int] = defaultdict(int)
    for piece in pieces:
        pairs[piece.source, piece.target] += piece.size * itemsize
    return dict(pairs)


def outgoing(bucket: Iterable[Piece], source: int) -> list[Piece]:
    """What trainer rank `source` sends of a bucket, in the order of its segments: by target, then by where it goes."""
    return sorted((piece for piece in bucket if piece.source == source), key=lambda p: (p.target, *_goes_to(p)))


def incoming(bucket: Iterable[Piece], target: int) -> list[Piece]:
    """What engine rank `target` gets of a bucket, in the order of arrival: by source, then by where it goes."""
    return sorted((piece for piece in bucket if piece.target == target), key=lambda p: (p.source, *_goes_to(p)))


def receipts(buckets: Iterable[Iterable[Piece]], target: int) -> list[list[Copy]]:
    """What engine rank `target` does with each delivery."""
    return [fold(rectangle(piece, piece.there) for piece in incoming(bucket, target)) for bucket in buckets]


def rectangle(piece: Piece, at: Place) -> Rectangle:
    """The piece as it lies at one of its two places."""
    return at.tensor, at.offset, piece.rows, piece.cols, at.row_stride, at.col_stride


def _goes_to(piece: Piece) -> tuple[str, int]:
    """Neighbours in a parameter are neighbours in the segment, so that they fold into long copies."""
    return piece.there.tensor, piece.there.offset
