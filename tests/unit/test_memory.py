"""The ledger of device memory: what it reports, and when it says that released memory did not come back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from one_rank import Alone

from megatron_sglang import memory, metrics
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.memory import GB, TOLERANCE, Ledger


class WithOthers(Alone):
    """Two more ranks, whose devices have so many bytes free."""

    def __init__(self, *free: int) -> None:
        self.others = list(free)

    def gather(self, value: dict[str, int]) -> list[dict[str, int]]:
        return [value, *(value | {"free": free} for free in self.others)]


def readings(*gb: float) -> Callable[[], int]:
    """One after the other; the last one stays."""
    left = [int(one * GB) for one in gb]
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SETTLES_S", 0.05)


def test_the_fullest_device_is_reported() -> None:
    """It is the one that runs out of memory; the leader's alone would look well."""
    ledger = Ledger(readings(60.0, 50.0))
    assert metrics.values(ledger.note(WithOthers(40 * GB, 90 * GB), "sync")) == {"memory/sync_free_gb": 40.0}
    assert metrics.values(ledger.note(WithOthers(80 * GB, 90 * GB), "rollout")) == {"memory/rollout_free_gb": 50.0}


def test_peaks_are_of_one_phase_and_the_largest_rank() -> None:
    """A peak that is not taken back would show the build's in every phase after it."""
    peaks = [{"allocated": 7 * GB, "reserved": 9 * GB}, {"allocated": 2 * GB, "reserved": 3 * GB}]
    some = {"allocated": GB, "reserved": GB}
    ledger = Ledger(readings(50.0, 50.0, 50.0), take_peaks=lambda: peaks.pop(0) if peaks else some)
    first, second, third = (ledger.note(Alone(), "train") for _ in range(3))
    assert metrics.values(first) == {
        "memory/train_free_gb": 50.0, "memory/train_allocated_gb": 7.0, "memory/train_reserved_gb": 9.0
    }  # fmt: skip
    assert metrics.values(metrics.merge([second, third]))["memory/train_reserved_gb"] == 3.0, "of several train steps"


def released(ledger: Ledger, times: int) -> None:
    for _ in range(times):
        ledger.note(Alone(), "release", same=True)


class Device:
    """So many GB of it are free, from one release to the next."""

    def __init__(self) -> None:
        self.free = self.own = 0.0

    def ledger(self) -> Ledger:
        return Ledger(lambda: int(self.free * GB), own=lambda: int(self.own * GB))


def test_less_after_a_later_release_is_an_error() -> None:
    """SGLang answers 200 to a release that frees nothing; a leak of a GB a batch ends a run after a night."""
    device = Device()
    ledger = device.ledger()
    slack = TOLERANCE / GB
    for device.free in (120.0, 100.0, 100.5 - slack, 101.0):
        released(ledger, 1)
    device.free = 99.0 - slack
    with pytest.raises(MegatronSglangError) as caught:
        released(ledger, 1)
    assert str(caught.value).startswith(
        "memory at release: 97.0 GB of the device are free, expected 100.0 GB or at most 2.0 GB less"
    )
    assert "enable_memory_saver" in str(caught.value)


def test_a_rank_of_the_engine_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang answers for its first rank: on two H200s the second one's last 5 GB came after the answer now and then."""
    monkeypatch.setattr(memory, "SETTLES_S", 20.0)
    ledger = Ledger(readings(120.0, 120.0, 100.0, 100.0, 95.0, 95.0, 96.0, 100.0, 90.5))
    released(ledger, 2)
    noted = metrics.values(ledger.note(Alone(), "release", same=True))
    assert noted["memory/release_free_gb"] == 90.5  # read when it had come


def test_what_the_trainer_itself_took_since_is_not_missing() -> None:
    """Its allocator keeps now more, now less of what the longest sequences needed."""
    device = Device()
    ledger = device.ledger()
    device.free, device.own = 100.0, 5.0
    released(ledger, 2)
    device.free, device.own = 90.0, 15.0
    released(ledger, 1)
    device.own = 10.0
    with pytest.raises(MegatronSglangError, match=r"expected 105\.0 GB"):
        released(ledger, 1)


def test_a_leak_that_never_jumps_is_found() -> None:
    """Each release is compared with the second, not with the one before."""
    device = Device()
    ledger = device.ledger()
    for batch in range(2 + 2 * TOLERANCE // GB):
        device.free = 100.5 - 0.5 * batch
        released(ledger, 1)
    device.free -= 0.5
    with pytest.raises(MegatronSglangError, match=r"expected 100\.0 GB"):
        released(ledger, 1)


def test_what_others_hold_is_told() -> None:
    """Without it nobody knows whether the trainer or the engine has grown."""
    ledger = Ledger(readings(50.0), own=readings(60.0), total=140 * GB)
    assert metrics.values(ledger.note(WithOthers(40 * GB), "sync"))["memory/sync_others_gb"] == 30.0


def test_an_engine_that_keeps_its_memory_is_found_at_the_start() -> None:
    """Before there is a model: 42 GB of a device taken, released, and not back."""
    Ledger(readings(133.0)).require("start", 139 * GB, tolerance=8 * GB)
    with pytest.raises(MegatronSglangError, match=r"memory at start: 97\.0 GB .* expected 139\.0 GB"):
        Ledger(readings(97.0)).require("start", 139 * GB, tolerance=8 * GB)


def test_there_is_none_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be those of nothing."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Ledger.of_device() is None


def test_room_that_is_late_is_waited_for_and_not_taken_for_less() -> None:
    """SGLang answers when its first rank is done with a release."""
    ledger = Ledger(readings(10.0, 10.0, 70.0))
    ledger.await_room(60 * GB)
    assert ledger.free() == 70 * GB
    began = time.monotonic()
    ledger.await_room(90 * GB)
    assert time.monotonic() - began >= memory.SETTLES_S, "whoever needs it finds out"
    for free, room in ((70.0, 50), (25.0, 50), (75.0, 55)):
        ledger.free = readings(free)
        ledger.note_room(20 * GB)
        assert ledger.room == room * GB


def test_an_engine_finds_as_much_as_it_gave_or_is_not_asked_back() -> None:
    """It would be out of memory in the middle of an update, and end, and be started again to the same end."""
    slack = TOLERANCE / GB
    ledger = Ledger(readings(10.0, 60.0, 55.0, 45.0, 45.0 - slack, 44.9 - slack))
    ledger.require_room(Alone())  # nothing is known of the first time
    ledger.note_room(15 * GB)
    assert ledger.room == 45 * GB
    for _ in range(3):
        ledger.require_room(Alone())
    with pytest.raises(MegatronSglangError, match=r"memory at resume: 42.9 GB .* the engine takes 45.0 GB back"):
        ledger.require_room(Alone())
