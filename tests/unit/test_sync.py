"""How the direct path ends when something fails on its way: one error, and no engine rank left waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import pytest
import torch
from one_rank import Alone

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.layout import Param, RankLayout, Write
from megatron_sglang.sync import DirectPath
from megatron_sglang.sync_plan import Plans, plan_for
from megatron_sglang.transfer import Box, Place, Region
from megatron_sglang.types import MergeFidelity


class Calls:
    """The part of an engine that a stream asks, in the order in which it was asked."""

    def __init__(self, verdict: str = "") -> None:
        self.made: list[str] = []
        self.verdict = verdict

    def open_stream(self, version: int) -> dict[str, Any]:
        self.made.append(f"open {version}")
        return {}

    def start_stream(self, call: Mapping[str, Any]) -> None:
        self.made.append("start")

    def end_stream(self, *, gave_up: bool) -> None:
        self.made.append(f"end {gave_up}")
        if self.verdict:
            raise WeightSyncError(self.verdict)


class NothingToSend:
    buckets: Sequence[Any] = ()
    dtype = torch.float32
    rounds = range(1)

    def deliveries(self, free: Callable[[int], None], failed: Callable[[], bool]) -> Iterator[Any]:
        yield from ()

    def fidelity(self) -> MergeFidelity:
        return MergeFidelity(0.0, 0.0, 0.0, {})


def test_a_rank_that_cannot_listen_fails_the_version_on_all() -> None:
    """Else the others would wait for it in the next collective, for an hour."""

    def no_room(_call: Mapping[str, Any], _rank: int) -> Any:
        raise OSError(28, "No space left on device")

    engine: Any = Calls()
    path = DirectPath(Alone(), NothingToSend(), engine, 1, no_room)
    with pytest.raises(WeightSyncError, match=r"version 3: cannot listen .*No space left"):
        path.send(3)
    assert engine.made == ["open 3", "end True"], "nothing was started, and the engine was told"


class Broken:
    """A line whose engine rank is gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def finish(self) -> None:
        raise WeightSyncError("weight version 3, stream after 1 deliveries, engine rank 0: the other side hung up")


def test_an_engine_that_dies_is_told_with_the_rank_and_the_delivery() -> None:
    """The engine knows that it is dead, the trainer rank where: either alone sends people to the wrong log."""
    engine: Any = Calls("stream: EngineDiedError: engine died")
    path = DirectPath(Alone(), NothingToSend(), engine, 1, lambda *_: cast("Any", Broken()))
    with pytest.raises(
        WeightSyncError, match=r"EngineDiedError.*; as the trainer saw it: .* 1 deliveries, engine rank 0:"
    ):
        path.send(3)
    assert engine.made == ["open 3", "start", "end True"]
    silent: Any = Calls()
    path = DirectPath(Alone(), NothingToSend(), silent, 1, lambda *_: cast("Any", Broken()))
    with pytest.raises(WeightSyncError, match=r"^weight version 3, stream after 1 deliveries"):
        path.send(3)


class Unforeseen(NothingToSend):
    def deliveries(self, free: Callable[[int], None], failed: Callable[[], bool]) -> Iterator[Any]:
        yield from ()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_error_that_nobody_foresaw_takes_no_further_step_with_the_others() -> None:
    """They are in an exchange and know nothing of it: a step to take together would hold this rank, and its error."""
    engine: Any = Calls()
    path = DirectPath(Alone(), Unforeseen(), engine, 0, lambda *_: cast("Any", Broken()))
    with pytest.raises(torch.OutOfMemoryError):
        path.send(3)
    assert engine.made == ["open 3", "start"]


class Described:
    """The part of an engine that planning asks: one parameter, filled from one tensor."""

    def __init__(self, columns: int = 2) -> None:
        self.columns, self.receipts = columns, 0

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
        write = Write("p", 0, (4, self.columns), (self.columns, 1), "w", 0, (self.columns, 1))
        return [RankLayout(0, {"p": Param((4, self.columns), (self.columns, 1), "float32")}, (write,))]

    def install_plan(self, receipts: Sequence[Any]) -> None:
        self.receipts += 1


def planned(plans: Plans | None, engine: Described, columns: int = 2, limit: int = 8, offset: int = 0) -> Any:
    held = Region(0, "w", Box(0, 0, 4, columns), Place("here", offset, columns, 1))
    return plan_for(Alone(), cast("Any", engine), 1, {"w": (4, columns)}, lambda: [held], limit, None, plans)


def test_a_plan_is_made_once_for_one_placement() -> None:
    """An engine that died is back in the same places: it is told the same plan, and nobody plans anew.
    Whatever moves, here or there, makes another."""
    plans, engine, revived = Plans(), Described(), Described()
    first = planned(plans, engine)
    assert planned(plans, revived) is first
    assert (engine.receipts, revived.receipts) == (1, 1)
    assert planned(None, engine) == first
    for other in ({"limit": 4}, {"offset": 16}, {"columns": 3}):
        changed = planned(plans, Described(other.get("columns", 2)), **other)
        assert changed is not first
        assert changed == planned(None, Described(other.get("columns", 2)), **other)
    assert planned(plans, engine) == first
