"""The line between a trainer rank and its engine rank, both ends in one process: bytes, verdicts, silence."""

from __future__ import annotations

import inspect
import json
import socket
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_sglang.engine import line, wire
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.unix_socket import short_name

CPU = torch.device("cpu")


def call(folder: Path, timeout_s: float = 20.0) -> dict[str, Any]:
    return {"id": 7, "version": 3, "folder": str(folder), "timeout_s": timeout_s}


class EngineRank(threading.Thread):
    """Takes `expected` deliveries of `folder`'s line and keeps them; `refuse` may raise."""

    def __init__(
        self,
        folder: Path,
        refuse: Callable[[dict[str, Any]], None] = lambda _: None,
        rank: int = 0,
        expected: int = 4,
    ) -> None:
        super().__init__(daemon=True)
        self.folder, self.refuse, self.rank, self.expected = folder, refuse, rank, expected
        self.taken: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            line.receive({**call(self.folder), "rank": self.rank}, CPU, self.expected, self.take)
        except Exception as error:  # noqa: BLE001
            self.error = error

    def take(self, header: dict[str, Any], data: torch.Tensor) -> None:
        self.refuse(header)
        self.taken.append((header, data.view(getattr(torch, header["dtype"])).clone()))


def deliver(end: line.Line, index: int, data: torch.Tensor) -> None:
    end.send({"index": index, "dtype": str(data.dtype).removeprefix("torch.")}, index % 2, data, data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Longer than a socket's address may be."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    return long


def test_deliveries_arrive_whole_and_in_order(folder: Path) -> None:
    """Larger than any socket buffer, empty, and of another dtype; the trainer may be two ahead."""
    sent = [torch.randn(600_000), torch.empty(0), torch.arange(5).bfloat16(), torch.randn(3)]
    with line.Line(call(folder), 0) as end:
        engine = EngineRank(folder)
        for index, data in enumerate(sent):
            if index >= 2:
                end.wait(index - 2)
            deliver(end, index, data)
        end.finish()
        engine.join(10)
    assert engine.error is None
    assert [header["index"] for header, _ in engine.taken] == [0, 1, 2, 3]
    assert all(torch.equal(got, data) for (_, got), data in zip(engine.taken, sent, strict=True))
    assert {header["version"] for header, _ in engine.taken} == {3}
    assert not list(folder.iterdir()), "the socket must not stay behind"


def test_of_several_engines_a_line_goes_to_the_one_beside_it(tmp_path: Path) -> None:
    """Bytes in another engine's rank would be refused by their digest, in every update."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    calls = [{**call(folder), "engine": f"engine {number}: "} for number, folder in enumerate(folders)]
    grouped = {"version": 3, "ranks_each": 2, "engines": calls}

    def refuse(header: dict[str, Any]) -> None:
        if header["index"] == 1:
            raise ValueError("no room")

    for rank in range(4):
        with line.open_line(grouped, rank) as end:
            engine = EngineRank(folders[rank // 2], refuse, rank % 2)
            deliver(end, 0, torch.tensor([float(rank)]))
            end.wait(0)
            deliver(end, 1, torch.ones(4))
            with pytest.raises(WeightSyncError, match=f"^engine {rank // 2}: .*, engine rank {rank % 2}: no room"):
                end.wait(1)
            engine.join(10)
        assert [data.item() for _, data in engine.taken] == [rank]


def test_a_refusal_reaches_the_trainer_with_its_reason(folder: Path) -> None:
    def refuse(header: dict[str, Any]) -> None:
        if header["index"] == 1:
            raise ValueError("arrived with digest 0x1, sent 0x2")

    with line.Line(call(folder), 0) as end:
        EngineRank(folder, refuse)
        for index in range(2):
            deliver(end, index, torch.ones(4))
        with pytest.raises(WeightSyncError, match=r"version 3, .*after 1 deliveries, engine rank 0: arrived with"):
            end.finish()


def test_a_refusal_is_not_lost_when_the_trainer_is_still_sending(folder: Path) -> None:
    """The engine rank hangs up amid a body: the broken pipe is the consequence, not the reason."""

    def refuse(_header: dict[str, Any]) -> None:
        raise ValueError("no room")

    with line.Line(call(folder), 0) as end:
        EngineRank(folder, refuse)
        deliver(end, 0, torch.ones(4))
        time.sleep(0.3)
        with pytest.raises(WeightSyncError, match="no room"):
            deliver(end, 1, torch.ones(2_000_000))


def test_a_refusal_is_not_lost_when_the_trainer_has_left(folder: Path) -> None:
    """It leaves when another rank has failed; what this one has found wrong may be why."""
    gone = threading.Event()

    def refuse(_header: dict[str, Any]) -> None:
        gone.wait(10)
        raise ValueError("arrived with digest 0x1, sent 0x2")

    with line.Line(call(folder), 0) as end:
        engine = EngineRank(folder, refuse)
        deliver(end, 0, torch.ones(4))
    gone.set()
    engine.join(10)
    assert str(engine.error) == "arrived with digest 0x1, sent 0x2"


def test_a_trainer_that_hangs_up_is_noticed(folder: Path) -> None:
    with line.Line(call(folder), 0) as end:
        engine = EngineRank(folder)
        deliver(end, 0, torch.ones(4))
        end.wait(0)
    engine.join(10)
    assert str(engine.error).startswith("after 1 deliveries: the trainer's line broke")


@pytest.mark.parametrize("expected", [1, 3])
def test_an_end_after_other_deliveries_than_planned_is_a_cut(folder: Path, expected: int) -> None:
    """The last one may be lost like any other. Trainer ranks end early where another one has failed: not the reason."""
    with line.Line(call(folder), 0) as end:
        engine = EngineRank(folder, expected=expected)
        for index in range(2):
            deliver(end, index, torch.ones(4))
        end.finish()
        engine.join(10)
    assert isinstance(engine.error, line.CutError)
    assert str(engine.error) == f"the trainer ended after 2 deliveries, expected {expected} by plan"


@pytest.mark.parametrize("listens", [True, False])
def test_a_trainer_that_has_left_already_is_no_fault_of_the_engine(folder: Path, listens: bool) -> None:
    """A rank that connects late, when another one has failed: its complaint must not bury that one's."""
    if listens:
        with socket.socket(socket.AF_UNIX) as left, short_name(folder / line.socket_name(7, 0)) as path:
            left.bind(path)
    engine = EngineRank(folder)
    engine.join(10)
    assert isinstance(engine.error, line.CutError)


@pytest.mark.parametrize("sign", [line.ended_name(7), wire.reply_name(7, 0)])
def test_an_engine_that_has_answered_is_not_waited_for(folder: Path, sign: str) -> None:
    """The engine died, or its rank refused the message: files tell trainer ranks, which know nothing of HTTP."""
    with line.Line(call(folder), 0) as end:
        Path(folder, sign).touch()
        began = time.monotonic()
        with pytest.raises(WeightSyncError, match="never connected"):
            deliver(end, 0, torch.ones(4))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("connects", [True, False])
def test_a_silent_engine_meets_the_deadline(folder: Path, connects: bool) -> None:
    """Every wait has one."""
    gate = threading.Event()

    def hold(_header: dict[str, Any]) -> None:
        gate.wait(10)

    with line.Line(call(folder, timeout_s=0.6), 0) as end:
        if connects:
            EngineRank(folder, hold)
            deliver(end, 0, torch.ones(4))
        with pytest.raises(WeightSyncError, match=r"no sign of life .* within 0\.6 s" if connects else "never conn"):
            end.finish() if connects else deliver(end, 0, torch.ones(4))
    gate.set()


def test_a_handle_names_what_torch_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA memory travels as torch's own numbers in JSON. Without a GPU: the names are those of torch's function, and
    what its counterpart gives comes out on the other side, in order, bytes as bytes."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert tuple(names[7:]) == line._FIELDS
    rest = [b"handle", 4096, 512, False, b"counter", 3, b"event", True]
    flat = torch.empty(100, dtype=torch.uint8)
    arguments = (torch.Tensor, flat.size(), flat.stride(), 5, torch.storage.TypedStorage, torch.uint8, 1, *rest)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _tensor: (None, arguments))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *given: given)
    properties = types.SimpleNamespace(uuid="GPU-1")
    devices = [types.SimpleNamespace(uuid="GPU-0"), properties]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: devices[device if device in (0, 1) else 1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    handle = json.loads(json.dumps(line.handle_of(flat)))
    opened: Any = line.open_handle(handle)
    assert list(opened) == list(arguments), "on device 1 here, whatever its number is there"
    properties.uuid = "GPU-2"
    with pytest.raises(ValueError, match="on GPU GPU-1, which this engine rank cannot see"):
        line.open_handle(handle)
