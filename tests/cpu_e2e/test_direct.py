"""The direct path against a real SGLang server: the same bits as through its loader, and no fault goes through.

The "trainer" holds every Hugging Face tensor whole, so only plan, delivery and proof are at work here; how Megatron's
shards get into a delivery is tests/dist/test_layouts.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_tools import Publisher, Weights

from megatron_sglang.buckets import digest
from megatron_sglang.engine import wire
from megatron_sglang.errors import EngineStaleError, WeightSyncError
from megatron_sglang.sync import constants_of
from megatron_sglang.transfer import Box, Piece, Place, Region, cut, make_plan, receipt, slots_of
from megatron_sglang.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = pytest.mark.cpu_e2e

Spoil = Callable[[int, torch.Tensor, dict[str, Any]], None]
REQUEST = GenerateRequest((1, 40, 2, 41, 3), SamplingParams(temperature=0.0, max_new_tokens=4, stop_token_ids=(0,)))


@pytest.fixture(scope="module")
def plan(engine: HttpEngine, publish: Publisher, weights: Weights) -> list[list[Piece]]:
    """Small buckets, installed in the engine."""
    publish(weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layouts = engine.layout(shapes)
    whole = []
    for name, shape in shapes.items():
        rows, cols = shape if len(shape) == 2 else (shape[0], 1)
        whole.append(Region(0, name, Box(0, 0, rows, cols), Place(name, 0, cols, 1)))
    slots = [slot for layout in layouts for slot in slots_of(layout, shapes)]
    buckets = cut(make_plan(whole, slots), limit=200_000)
    assert len(buckets) > 2
    engine.install_plan(
        [
            {"buckets": [receipt(bucket, found.rank) for bucket in buckets], "constants": constants_of(found)}
            for found in layouts
        ]
    )
    return buckets


def hand_over(
    engine: HttpEngine, bucket: list[Piece], weights: Weights, version: int, index: int, spoil: Spoil | None = None
) -> None:
    """Delivery `index`; `spoil` may change what engine rank 1 is handed."""
    ticket = engine.ticket(version, index)
    payloads = []
    for rank in range(2):
        parts = []
        for piece in (piece for piece in bucket if piece.target == rank):
            shape, strides = (piece.rows, piece.cols), (piece.here.row_stride, piece.here.col_stride)
            parts.append(weights[piece.name].reshape(-1).as_strided(shape, strides, piece.here.offset).reshape(-1))
        flat = torch.cat(parts)
        envelope = {**ticket, "rank": rank, "lengths": [flat.numel()], "digests": [digest(flat)], "dtype": "float32"}
        if spoil is not None and rank == 1:
            spoil(index, flat, envelope)
        payloads.append(wire.serialize(envelope, flat.view(torch.uint8)))
    engine.deliver(ticket, payloads)


def send(
    engine: HttpEngine, plan: list[list[Piece]], weights: Weights, version: int, spoil: Spoil | None = None
) -> str:
    """One version by the plan."""
    engine.begin_update(version)
    for index, bucket in enumerate(plan):
        hand_over(engine, bucket, weights, version, index, spoil)
    return engine.commit_update(version, len(plan))


def test_both_paths_leave_the_same_bits(engine, publish, plan, weights, other_weights) -> None:
    """The direct path is right if the engine cannot be told apart from one that loaded through SGLang's own loader."""
    generic = [publish(weights), publish(other_weights)]
    assert generic[0] != generic[1]
    direct = [send(engine, plan, given, publish.next_version) for given in (weights, other_weights)]
    assert direct == generic
    assert engine.generate([REQUEST])[0].weight_version == engine.version


def flip_a_bit(index: int, flat: torch.Tensor, _envelope: dict[str, Any]) -> None:
    if index == 1:
        flat.view(torch.uint8)[77] ^= 4


def cut_short(index: int, _flat: torch.Tensor, envelope: dict[str, Any]) -> None:
    if index == 1:
        envelope["lengths"] = [envelope["lengths"][0] - 1]


def repeat(index: int, _flat: torch.Tensor, envelope: dict[str, Any]) -> None:
    if index == 1:
        envelope["index"] = 0


def older_version(index: int, _flat: torch.Tensor, envelope: dict[str, Any]) -> None:
    if index == 2:
        envelope["version"] -= 1


FAULTS = [
    (flip_a_bit, "arrived with digest"),
    (cut_short, "expected"),
    (repeat, "reordered"),
    (older_version, "expected"),
]


@pytest.mark.parametrize(("spoil", "text"), FAULTS)
def test_a_fault_is_caught_not_served_and_healed(engine, publish, plan, weights, spoil, text) -> None:
    """One engine rank with other weights than its neighbour samples nonsense that looks like text."""
    with pytest.raises(WeightSyncError, match=rf"delivery [12], engine rank 1: .*{text}"):
        send(engine, plan, weights, publish.next_version, spoil)
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    assert send(engine, plan, weights, publish.next_version) == publish(weights)


def test_a_missing_delivery_is_caught_at_commit(engine, publish, plan, weights) -> None:
    """Parameters are poisoned when an update begins, so that what does not come is not yesterday's weight."""
    version = publish.next_version
    engine.begin_update(version)
    hand_over(engine, plan[0], weights, version, 0)
    with pytest.raises(WeightSyncError, match=r"commit.* has 1 buckets"):
        engine.commit_update(version, len(plan))
    publish(weights)


@pytest.mark.parametrize("change", ["drop", "double", "unknown"])
def test_a_plan_that_does_not_cover_every_element_once_is_refused(engine, publish, plan, weights, change) -> None:
    """A plan is made once and trusted for the whole run."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    receipts = []
    for found in engine.layout(shapes):
        rectangles = [list(receipt(bucket, found.rank)) for bucket in plan]
        if change == "drop":
            rectangles[0] = rectangles[0][1:]
        elif change == "double":
            rectangles[0].append(rectangles[0][0])
        else:
            rectangles[0][0] = ("no.such.parameter", *rectangles[0][0][1:])
        receipts.append({"buckets": rectangles, "constants": constants_of(found)})
    with pytest.raises(WeightSyncError, match=r"transfer plan, engine rank 0: the plan (leaves|writes)"):
        engine.install_plan(receipts)
    publish(weights)
