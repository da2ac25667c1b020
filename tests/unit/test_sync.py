"""How the direct path ends when something fails on its way: one error, and no engine rank left waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import pytest
import torch
from one_rank import Alone

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.sync import DirectPath
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
