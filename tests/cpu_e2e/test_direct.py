"""The direct path against a real SGLang server: the same bits as through its loader, and no fault goes through.

The "trainer" holds every Hugging Face tensor whole, so only plan, delivery and proof are at work here; how Megatron's
shards get into a delivery is tests/dist/test_layouts.py's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from engine_tools import Publisher, Weights, until_decoding

from megatron_sglang.digests import digest
from megatron_sglang.engine.line import Line
from megatron_sglang.errors import EngineStaleError, WeightSyncError
from megatron_sglang.sync_plan import receipt_of
from megatron_sglang.transfer import Box, Piece, Place, Region, cut, incoming, make_plan, slots_of
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
    engine.install_plan([receipt_of(found, buckets) for found in layouts])
    return buckets


def part_of(bucket: list[Piece], weights: Weights, rank: int) -> torch.Tensor:
    """What engine rank `rank` gets of a bucket."""
    parts = []
    for piece in incoming(bucket, rank):
        shape, strides = (piece.rows, piece.cols), (piece.here.row_stride, piece.here.col_stride)
        parts.append(weights[piece.name].reshape(-1).as_strided(shape, strides, piece.here.offset).reshape(-1))
    return torch.cat(parts)


def send(
    engine: HttpEngine,
    plan: list[list[Piece]],
    weights: Weights,
    version: int,
    spoil: Spoil | None = None,
    order: list[int] | None = None,
) -> str:
    """One version by the plan. `spoil` may change what engine rank 1 is handed; `order`: of the buckets."""
    engine.begin_update(version, direct=True)
    call = engine.open_stream(version)
    gave_up = True
    try:
        with Line(call, 0) as first, Line(call, 1) as second:
            engine.start_stream(call)
            for index in range(len(plan)) if order is None else order:
                for rank, line in enumerate((first, second)):
                    flat = part_of(plan[index], weights, rank)
                    header = {"index": index, "lengths": [flat.numel()], "digests": [digest(flat)], "dtype": "float32"}
                    if spoil is not None and rank == 1:
                        spoil(index, flat, header)
                    line.send(header, index % 2, flat, flat)
            for line in (first, second):
                line.finish()
        gave_up = False
    finally:
        engine.end_stream(gave_up=gave_up)
    return engine.commit_update(version, len(plan))


def test_both_paths_leave_the_same_bits(engine, publish, plan, weights, other_weights) -> None:
    """The direct path is right if the engine cannot be told apart from one that loaded through SGLang's own loader."""
    generic = [publish(weights), publish(other_weights)]
    assert generic[0] != generic[1]
    direct = [send(engine, plan, given, publish.next_version) for given in (weights, other_weights)]
    assert direct == generic
    assert engine.generate([REQUEST])[0].weight_version == engine.version


def test_a_plan_does_not_wait_for_requests(engine, publish, plan, weights) -> None:
    """They begin while it is made, in the engine that the generic path has published to; see the layout's test."""
    publish(weights)
    receipts = [
        receipt_of(found, plan) for found in engine.layout({name: tuple(one.shape) for name, one in weights.items()})
    ]
    long = [GenerateRequest((7, 8, 9), SamplingParams(max_new_tokens=200, seed=seed)) for seed in range(160)]
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(engine.generate, long)
        asyncio.run(until_decoding(engine, 20))
        engine.install_plan(receipts)
        assert "abort" in {one.finish_reason for one in others.result()}
    assert engine.generate([REQUEST])[0].weight_version == engine.version


def test_a_version_is_one_message_to_the_engine_ranks(engine, publish, plan, weights, monkeypatch) -> None:
    """Each costs 6 ms on a GPU host, where an update takes 300: SGLang's own processes and all ranks pass it on."""
    posted: list[str] = []
    post = engine._http.post
    monkeypatch.setattr(engine._http, "post", lambda path, *rest: (posted.append(path), post(path, *rest))[1])
    send(engine, plan, weights, publish.next_version)
    assert posted == [
        "/pause_generation", "/update_weights_from_tensor", "/update_weight_version", "/continue_generation",
    ]  # fmt: skip


def flip_a_bit(index: int, flat: torch.Tensor, _envelope: dict[str, Any]) -> None:
    if index == 1:
        flat.view(torch.uint8)[77] ^= 4


def cut_short(index: int, _flat: torch.Tensor, envelope: dict[str, Any]) -> None:
    if index == 1:
        envelope["lengths"] = [envelope["lengths"][0] - 1]


def older_version(index: int, _flat: torch.Tensor, header: dict[str, Any]) -> None:
    if index == 2:
        header["version"] = 0


def other_dtype(index: int, _flat: torch.Tensor, header: dict[str, Any]) -> None:
    if index == 1:
        header["dtype"] = "bfloat16"


FOR = r"for model\.[\w.]+(, model\.[\w.]+)*( and \d+ more)?"
"""A bucket has many parameters, so the first of them are named."""
FAULTS = [
    (flip_a_bit, None, rf"delivery 1, part of trainer rank 0, {FOR}: arrived with digest"),
    (cut_short, None, rf"delivery 1, {FOR}: it has \d+ elements of float32, expected"),
    (other_dtype, None, rf"delivery 1, {FOR}: it has \d+ elements of bfloat16, expected"),
    (older_version, None, rf"got delivery 2 of version 0, expected 2 of version \d+, {FOR}"),
    (None, [0, 2, 1], rf"got delivery 2 .*, expected 1 .*, {FOR}, .*dropped, repeated or reordered"),
    (None, [0, 1, 1], rf"got delivery 1 .*, expected 2 .*, {FOR}, .*dropped, repeated or reordered"),
]


@pytest.mark.parametrize(("spoil", "order", "text"), FAULTS)
def test_a_fault_is_caught_not_served_and_healed(engine, publish, plan, weights, spoil, order, text) -> None:
    """One engine rank with other weights than its neighbour samples nonsense that looks like text."""
    with pytest.raises(WeightSyncError, match=rf"stream.* engine rank [01]: .*{text}"):
        send(engine, plan, weights, publish.next_version, spoil, order)
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    assert send(engine, plan, weights, publish.next_version) == publish(weights)


@pytest.mark.parametrize("dropped", ["last", "all but the first"])
def test_a_missing_delivery_is_caught(engine, publish, plan, weights, other_weights, dropped) -> None:
    """What does not come is yesterday's weight: nothing in the parameters tells, each of them is filled and finite."""
    count = len(plan) - 1 if dropped == "last" else 1
    good = send(engine, plan, weights, publish.next_version)
    said = rf"the trainer ended after {count} deliveries, expected {len(plan)} by plan"
    with pytest.raises(WeightSyncError, match=rf"version \d+, stream, engine rank 0: {said}"):
        send(engine, plan, other_weights, publish.next_version, order=list(range(count)))
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    assert send(engine, plan, weights, publish.next_version) == good


def test_one_delivery_too_many_is_refused(engine, publish, plan, weights) -> None:
    order = [*range(len(plan)), len(plan) - 1]
    with pytest.raises(WeightSyncError, match=rf"got delivery {len(plan) - 1} .*, expected {len(plan)} of"):
        send(engine, plan, weights, publish.next_version, order=order)
    publish(weights)


def test_a_diverged_trainer_is_refused(engine, publish, plan, weights) -> None:
    """Bits arrive as they were sent, so only the finite check of the stream's end can say no."""
    [name] = [name for name in weights if name.endswith("layers.1.post_attention_layernorm.weight")]
    diverged = {**weights, name: weights[name].clone().fill_(torch.inf)}
    with pytest.raises(WeightSyncError, match=rf"stream, engine rank 0: 1 parameters .* NaN or infinity: {name}"):
        send(engine, plan, diverged, publish.next_version)
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    assert send(engine, plan, weights, publish.next_version) == publish(weights)


def test_a_trainer_that_gives_up_leaves_no_rank_waiting(engine, publish, plan, weights) -> None:
    """Its lines are cut, and the engine ranks answer at once instead of at their deadline."""
    version = publish.next_version
    engine.begin_update(version, direct=True)
    call = engine.open_stream(version)
    flat = part_of(plan[0], weights, 0)
    with Line(call, 0) as first, Line(call, 1):
        engine.start_stream(call)
        header = {"index": 0, "lengths": [flat.numel()], "digests": [digest(flat)], "dtype": "float32"}
        first.send(header, 0, flat, flat)
        first.wait(0)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine rank 0: after 1 deliveries: the trainer's line broke"):
        engine.end_stream(gave_up=False)
    assert time.monotonic() - began < 10
    publish(weights)


@pytest.mark.parametrize("refused", [True, False])
def test_a_trainer_rank_that_ends_early_for_another_is_not_the_reason(engine, publish, plan, weights, refused) -> None:
    """It says that these were all, as after a whole version. Engine rank 0 must neither commit nor be the one named."""
    version = publish.next_version
    engine.begin_update(version, direct=True)
    call = engine.open_stream(version)
    flats = [part_of(plan[0], weights, rank) for rank in (0, 1)]
    headers = [{"index": 0, "lengths": [len(it)], "digests": [digest(it)], "dtype": "float32"} for it in flats]
    if refused:
        headers[1]["digests"] = [5]
    with Line(call, 0) as first, Line(call, 1) as second:
        engine.start_stream(call)
        for line, header, flat in zip((first, second), headers, flats, strict=True):
            line.send(header, 0, flat, flat)
        first.finish()
    if refused:
        with pytest.raises(WeightSyncError, match=r"engine rank 1: delivery 0, .*: arrived with digest .*, sent 0x5$"):
            engine.end_stream(gave_up=True)
    else:
        engine.end_stream(gave_up=True)  # nothing that the trainer does not know
        with pytest.raises(WeightSyncError, match="commit: no stream of this version has ended well"):
            engine.commit_update(version, 1)
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    assert send(engine, plan, weights, publish.next_version) == publish(weights)


@pytest.mark.parametrize("change", ["drop", "double", "unknown"])
def test_a_plan_that_does_not_cover_every_element_once_is_refused(engine, publish, plan, weights, change) -> None:
    """A plan is made once and trusted for the whole run."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    receipts = [receipt_of(found, plan) for found in engine.layout(shapes)]
    for receipt in receipts:
        first = receipt["buckets"][0]
        if change == "drop":
            del first[0]
        elif change == "double":
            first.append(first[0])
        else:
            first[0] = ("no.such.parameter", *first[0][1:])
    with pytest.raises(WeightSyncError, match=r"transfer plan, engine rank 0: the plan (leaves|writes)"):
        engine.install_plan(receipts)
    publish(weights)


def scheduler_of(engine: HttpEngine, rank: int) -> psutil.Process:
    """The process of one engine rank, by the number that SGLang puts into its title."""
    tree = psutil.Process(engine.server.pid).children(recursive=True)
    return next(process for process in tree if f"scheduler_TP{rank}" in "".join(process.cmdline()))


def stopped_in(engine: HttpEngine, plan: list[list[Piece]], weights: Weights, send_signal: int) -> str:
    """All that is said where engine rank 1 gets a signal between two deliveries, by the engine and on the line."""

    def strike(index: int, _flat: torch.Tensor, _header: dict[str, Any]) -> None:
        if index == 1:
            scheduler_of(engine, 1).send_signal(send_signal)

    with pytest.raises(WeightSyncError) as caught:
        send(engine, plan, weights, (engine.version or 0) + 1, strike)
    with pytest.raises(EngineStaleError):
        engine.generate([REQUEST])
    said: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:
        said.append(f"{type(error).__name__}: {error}")
        error = error.__context__
    return "\n".join(said)


def test_an_engine_rank_that_is_slow_meets_the_deadline(engine, publish, plan, weights, monkeypatch) -> None:
    """A trainer that waits for ever holds all its devices; one that goes on leaves a rank with other weights."""
    good = send(engine, plan, weights, publish.next_version)
    monkeypatch.setattr(engine, "options", dataclasses.replace(engine.options, update_timeout_s=8.0))
    began = time.monotonic()
    try:
        message = stopped_in(engine, plan, weights, signal.SIGSTOP)
        assert time.monotonic() - began < 20
    finally:
        scheduler_of(engine, 1).send_signal(signal.SIGCONT)
    assert "engine did not answer /update_weights_from_tensor within 8 s" in message, message
    assert re.search(
        r"stream after \d deliveries, engine rank 1: (no sign of life|the other side has ended)", message
    ), message
    monkeypatch.undo()
    assert publish(weights) == good


def test_an_engine_rank_that_dies_is_named_and_its_engine_heals(engine, publish, plan, weights) -> None:
    """SGLang takes the whole engine down with it. A new one knows neither plan nor weights, and gets both."""
    good = send(engine, plan, weights, publish.next_version)
    began = time.monotonic()
    message = stopped_in(engine, plan, weights, signal.SIGKILL)
    assert time.monotonic() - began < 30
    assert "engine died during /update_weights_from_tensor" in message, message
    assert re.search(r"stream after \d deliveries, engine rank 1: the other side", message), message
    engine.restart()
    assert publish(weights) == good
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    engine.install_plan([receipt_of(found, plan) for found in engine.layout(shapes)])
    assert send(engine, plan, weights, publish.next_version) == good
