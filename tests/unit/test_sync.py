"""How the direct path ends when something fails on its way: one error, and no engine rank left waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from one_rank import Alone

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.sync import DirectPath
from megatron_sglang.types import MergeFidelity


class Calls:
    """The part of an engine that a stream asks, in the order in which it was asked."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def open_stream(self, version: int) -> dict[str, Any]:
        self.made.append(f"open {version}")
        return {}

    def start_stream(self, call: Mapping[str, Any]) -> None:
        self.made.append("start")

    def end_stream(self, *, gave_up: bool) -> None:
        self.made.append(f"end {gave_up}")


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
