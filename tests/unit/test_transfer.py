"""The direct path's plan: every element of every slot from exactly one place, whatever the cuts on either side."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.transfer import Box, Piece, Place, Region, cut, make_plan, traffic

NAME = "model.layers.0.mlp.experts.0.gate_proj.weight"


def tiles(rows: int, cols: int, row_cuts: list[int], col_cuts: list[int]) -> list[Box]:
    """The matrix cut along rows and columns."""
    downs, rights = sorted({0, rows, *row_cuts}), sorted({0, cols, *col_cuts})
    return [
        Box(top, left, bottom - top, right - left)
        for top, bottom in itertools.pairwise(downs)
        for left, right in itertools.pairwise(rights)
    ]


def regions(boxes: list[Box], tensor: str, ranks: int, name: str = NAME) -> list[Region]:
    """Each box in memory of its own, dealt out to `ranks`."""
    return [Region(i % ranks, name, box, Place(f"{tensor}{i}", 0, box.cols, 1)) for i, box in enumerate(boxes)]


@settings(max_examples=150)
@given(data=st.data())
def test_any_cuts_are_delivered_exactly(data: st.DataObject) -> None:
    """Played back on element numbers, every slot must hold its own elements: none missing, none twice, none moved."""
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))

    def cuts(limit: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, limit), max_size=3))

    shards = regions(tiles(rows, cols, cuts(rows), cuts(cols)), "here", 3)
    shards += [Region(3, shard.name, shard.box, shard.place) for shard in shards[::2]]  # replicas
    slots = regions(tiles(rows, cols, cuts(rows), cuts(cols)), "there", 2)
    pieces = make_plan(shards, slots)

    memory = {
        shard.place.tensor: [
            (shard.box.row + r) * cols + shard.box.col + c for r in range(shard.box.rows) for c in range(shard.box.cols)
        ]
        for shard in shards
    }
    arrived: dict[str, dict[int, int]] = {slot.place.tensor: {} for slot in slots}
    for bucket in cut(pieces, limit=10):
        for target in {piece.target for piece in bucket}:
            mine = [piece for piece in bucket if piece.target == target]
            assert sum(piece.size for piece in mine) <= 10 or all(piece.rows == 1 for piece in mine)
        for piece in bucket:
            here, there = piece.here, piece.there
            for r in range(piece.rows):
                for c in range(piece.cols):
                    at = there.offset + r * there.row_stride + c * there.col_stride
                    assert at not in arrived[there.tensor]
                    element = memory[here.tensor][here.offset + r * here.row_stride + c * here.col_stride]
                    arrived[there.tensor][at] = element
    for slot in slots:
        box = slot.box
        expected = [(box.row + r) * cols + box.col + c for r in range(box.rows) for c in range(box.cols)]
        assert [arrived[slot.place.tensor][at] for at in range(box.size)] == expected


def test_a_slot_that_nobody_fills_is_an_error() -> None:
    """Silence would leave old or random weights in the engine."""
    whole = [Region(0, NAME, Box(0, 0, 4, 4), Place("w", 0, 4, 1))]
    with pytest.raises(WeightSyncError, match=r"8 of the 16 elements of .*gate_proj.* engine rank 1"):
        make_plan([Region(0, NAME, Box(0, 0, 2, 4), Place("w", 0, 4, 1))], [Region(1, NAME, *_of(whole[0]))])


def _of(region: Region) -> tuple[Box, Place]:
    return region.box, region.place


def test_replicas_on_the_targets_device_stay_there_and_others_share_the_work() -> None:
    """Bytes that need not travel must not; of equal senders none may become the bottleneck."""
    box = Box(0, 0, 8, 8)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(12)]
    shards = [Region(rank, name, box, Place("w", 0, 8, 1)) for name in names for rank in (0, 1)]
    slots = [Region(rank, name, box, Place("p", 0, 8, 1)) for name in names for rank in (0, 1, 2, 3)]
    pairs = traffic(make_plan(shards, slots), itemsize=2)
    assert pairs[0, 0] == pairs[1, 1] == 12 * 64 * 2
    assert (0, 1) not in pairs
    assert (1, 0) not in pairs
    sent = [sum(size for (source, target), size in pairs.items() if source == rank != target) for rank in (0, 1)]
    assert sent[0] == sent[1] == 12 * 64 * 2


def test_replicas_on_the_targets_machine_come_before_those_that_send_less() -> None:
    """A network link is a fraction of NVLink; and within the machine the work is still shared."""
    box = Box(0, 0, 8, 8)
    names = [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in range(12)]
    shards = [Region(rank, name, box, Place("w", 0, 8, 1)) for name in names for rank in (0, 1, 4)]
    slots = [Region(rank, name, box, Place("p", 0, 8, 1)) for name in names for rank in (2, 3, 5, 6)]
    pairs = traffic(make_plan(shards, slots, machines=[0, 0, 0, 0, 1, 1, 1]), itemsize=2)
    assert {source for source, target in pairs if target in (2, 3)} == {0, 1}
    assert {source for source, target in pairs if target in (5, 6)} == {4}
    sent = [sum(size for (source, _), size in pairs.items() if source == rank) for rank in (0, 1, 4)]
    assert sent == [12 * 64 * 2, 12 * 64 * 2, 24 * 64 * 2]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(70, [12, 12, 12]), (35, [6] * 6), (40, [8, 8, 8, 8, 4]), (25, [4, 4, 4, 4, 4, 4, 4, 4, 4])],
)
def test_buckets_bound_what_a_target_receives(limit: int, expected: list[int]) -> None:
    """The extra memory of an update is the size of its buckets. A layer that fits stays whole,
    unless a quarter of a bucket would be left empty for it."""
    slots = [
        Region(rank, f"model.layers.{layer}.w{part}", Box(0, 0, 5, 2), Place("p", 0, 2, 1))
        for layer in range(6)
        for part in range(3)
        for rank in (0, 1)
    ]
    shards = [Region(0, slot.name, slot.box, slot.place) for slot in slots]
    buckets = cut(make_plan(shards, slots), limit=limit)
    assert [len(bucket) for bucket in buckets] == expected
    for bucket in buckets:
        for target in (0, 1):
            assert sum(piece.size for piece in bucket if piece.target == target) <= limit


def experts(count: int, sources: int, targets: int, inside: int = 1) -> list[Piece]:
    """A layer of experts over `sources` expert-parallel ranks, two tensors each, to an engine of targets, of which so
    many have the same experts and share them by rows."""
    names = [(e, f"model.layers.0.mlp.experts.{e}.{part}_proj.weight") for e in range(count) for part in ("up", "down")]
    shards = [Region(e * sources // count, name, Box(0, 0, 8, 2), Place(name, 0, 2, 1)) for e, name in names]
    groups = targets // inside
    slots = [
        Region(e * groups // count * inside + r, name, Box(8 // inside * r, 0, 8 // inside, 2), Place(name, 0, 2, 1))
        for e, name in names
        for r in range(inside)
    ]
    return make_plan(shards, slots)


@pytest.mark.parametrize(("sources", "targets", "inside"), [(2, 2, 2), (4, 4, 4), (8, 8, 8), (4, 4, 1), (2, 4, 2)])
def test_a_layer_that_is_cut_keeps_all_ranks_busy_in_every_bucket(sources: int, targets: int, inside: int) -> None:
    """Cut in order, its first buckets come from the first ranks alone, and the others wait: 23.4 GB instead of 14.5 on
    the links of two GPUs."""
    pieces = experts(32, sources, targets, inside)
    per_target = sum(piece.size for piece in pieces) // targets
    buckets = cut(pieces, limit=per_target // 4)
    assert len(buckets) == 4
    for end in ("source", "target"):
        busiest = [max(_by(bucket, end).values()) for bucket in buckets]
        assert sum(busiest) == sum(piece.size for piece in pieces) // {"source": sources, "target": targets}[end]
    assert sorted(piece.name for bucket in buckets for piece in bucket) == sorted(piece.name for piece in pieces)
    for bucket in buckets:
        whole = [name for name, size in Counter(piece.name for piece in bucket).items() if size == inside]
        assert len(whole) == len({piece.name for piece in bucket}), "a tensor's pieces stay together"
    assert cut(list(pieces), limit=per_target // 4) == buckets


@pytest.mark.parametrize("limit", [64, 24])
def test_pipeline_stages_send_at_the_same_time(limit: int) -> None:
    """Layer after layer the ranks of one stage would send to all engine ranks, from buffers as many times as large as
    there are ranks, while those of the other stages wait."""
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(6) for e in range(8)]
    box = Box(0, 0, 4, 2)
    stages = {name: int(name.split(".")[2]) // 3 for name in names}
    shards = [
        Region(2 * stages[name] + number % 2, name, box, Place("w", 0, 2, 1)) for number, name in enumerate(names)
    ]
    slots = [Region(rank, name, Box(rank, 0, 1, 2), Place(name, 0, 2, 1)) for name in names for rank in range(4)]
    pieces = make_plan(shards, slots)
    buckets = cut(pieces, limit=limit)
    assert sorted(piece.name for bucket in buckets for piece in bucket) == sorted(piece.name for piece in pieces)
    for bucket in buckets:
        sent = _by(bucket, "source")
        assert len(sent) == 4
        assert max(sent.values()) <= limit * 1.25, "all receive as much as the limit, and send as much"
        assert max(_by(bucket, "target").values()) <= limit


def _by(bucket: list[Piece], end: str) -> Counter[int]:
    sizes: Counter[int] = Counter()
    for piece in bucket:
        sizes[getattr(piece, end)] += piece.size
    return sizes


def test_a_tensor_that_is_too_large_is_cut_by_its_rows() -> None:
    """An embedding is larger than a layer, and the buffers would be as large as it for one bucket of a version."""
    shards = [Region(rank, "model.embed_tokens.weight", Box(0, 0, 10, 3), Place("e", 0, 3, 1)) for rank in (0, 1)]
    slots = [Region(rank, "model.embed_tokens.weight", Box(5 * rank, 0, 5, 3), Place("p", 0, 3, 1)) for rank in (0, 1)]
    buckets = cut(make_plan(shards, slots), limit=6)
    assert [[(piece.source, piece.target, piece.rows) for piece in bucket] for bucket in buckets] == [
        [(0, 0, 1), (1, 1, 1)],
        [(0, 0, 2), (1, 1, 2)],
        [(0, 0, 2), (1, 1, 2)],
    ]
    assert [piece.here.offset for bucket in buckets for piece in bucket] == [0, 15, 3, 18, 9, 24]
    assert [piece.there.offset for bucket in buckets for piece in bucket] == [0, 0, 3, 3, 9, 9]
