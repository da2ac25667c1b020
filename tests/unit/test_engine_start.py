"""What happens to an engine before the trainer's model is built, in which order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_sglang import memory
from megatron_sglang.config import RunConfig
from megatron_sglang.config_load import split_argv
from megatron_sglang.errors import EngineError, MegatronSglangError
from megatron_sglang.memory import Ledger
from megatron_sglang.training import engine_start, modes, run
from megatron_sglang.training.engine_start import EngineStart
from megatron_sglang.types import GenerateRequest, Prompt, SamplingParams

PROMPTS = tuple(Prompt(str(n), (n, n + 1), "text", {}) for n in range(9))
SAMPLING = SamplingParams(max_new_tokens=900, temperature=0.7, stop=("never sent so",), stop_token_ids=(3,), seed=None)


class Recorder:
    """An engine that notes what is asked of it."""

    unproved = ""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.requests: Sequence[GenerateRequest] = ()
        self.may_answer = threading.Event()
        self.error: EngineError | None = None

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.asked.append(name)

    def warm_up(self, requests: Sequence[GenerateRequest]) -> None:
        assert self.may_answer.wait(20)
        self.asked.append("warm_up")
        self.requests = requests
        if self.error is not None:
            raise self.error


def config(*more: str) -> RunConfig:
    words = ("model.hf_path=m", "data.train=t", "--rollout-mode", "colocated")
    return split_argv([*words, "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=2", *more]).config


def start(
    engine: Recorder, monkeypatch: pytest.MonkeyPatch, *more: str, devices: int = 1, left: int = 95
) -> EngineStart:
    """left: GB of the device that are free when the engine has given back its memory; of 100 before it started."""
    monkeypatch.setattr(modes, "devices", lambda: devices)
    free = [100 * 10**9, left * 10**9]
    ledger = Ledger(lambda: free.pop(0) if len(free) > 1 else free[0]) if devices else None
    monkeypatch.setattr(memory, "SETTLES_S", 0.05)
    monkeypatch.setattr(engine_start.Ledger, "of_device", lambda: ledger)
    return EngineStart(config(*more), engine, engine.asked.append)


@pytest.mark.parametrize(
    ("devices", "expected"), [(1, ["start", "announce", "imports", "wait_ready"]), (0, ["start", "announce"])]
)
def test_an_engine_that_comes_first_is_waited_for_after_the_imports(
    devices: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take half a minute and more; one after the other every start on a GPU would be so much longer."""
    engine = Recorder()
    start(engine, monkeypatch, devices=devices).begin(meanwhile=lambda: engine.asked.append("imports"))
    assert [one for one in engine.asked if " " not in one] == expected


def test_it_warms_up_in_the_background_and_is_released_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is given back under running requests ends SGLang; a model that is built before has no room."""
    engine = Recorder()
    starting = start(engine, monkeypatch, "sglang.enable_memory_saver=true")
    starting.warm_up(PROMPTS, SAMPLING)
    assert engine.asked == []
    engine.may_answer.set()
    starting.make_room()
    assert [one for one in engine.asked if " " not in one] == ["warm_up", "release"]
    assert [request.token_ids_T for request in engine.requests] == [
        prompt.token_ids_T for prompt in PROMPTS[:4] for _ in range(2)
    ]
    sampling = {request.sampling for request in engine.requests}.pop()
    assert (sampling.max_new_tokens, sampling.stop, sampling.temperature) == (engine_start.WARM_UP_TOKENS, (), 0.7)
    starting.make_room()  # nothing is left to release
    assert engine.asked.count("release") == 1


def test_memory_that_does_not_come_back_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = start(Recorder(), monkeypatch, "sglang.enable_memory_saver=true", left=85)
    with pytest.raises(MegatronSglangError, match=r"memory at start: 85\.0 GB"):
        starting.make_room()


@pytest.mark.parametrize("devices", [0, 1])
def test_without_the_memory_saver_or_a_gpu_nothing_is_released(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()
    starting = start(engine, monkeypatch, devices=devices)
    starting.warm_up((), SAMPLING)  # the batches come through a door: none is known
    starting.make_room()
    assert engine.asked == []


def test_what_fails_in_the_background_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()
    engine.error = EngineError("the engine died in its first batch")
    starting = start(engine, monkeypatch)
    starting.warm_up(PROMPTS, SAMPLING)
    engine.may_answer.set()
    with pytest.raises(EngineError, match="died in its first batch"):
        starting.make_room()


def test_ranks_wait_longer_for_the_leader_than_it_waits_itself() -> None:
    """They gave up after an hour, whatever deadline the user had given the leader's own work."""
    common = ["model.hf_path=x", "data.train=y"]
    feed = "rollout.environment={name: feed, timeout_s: 90000}"
    turns = "rollout.environment={name: arithmetic, max_turns: 20, step_timeout_s: 900}"
    for given, longest in (
        ([], 600.0),
        (["engine.request_timeout_s=7200"], 7200.0),
        ([feed], 90_000.0),
        ([turns], 20 * (600.0 + 900.0)),
        (["reward.name=function:judge.score", "reward.timeout_s=9000"], 9000.0),
    ):
        assert run._patience(split_argv([*common, *given]).config) > longest, given
