"""The client's promises, against the scriptable engine: order, deadlines, refusals, and no process left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from engine_tools import fake_options as options
from engine_tools import script, until_running

from megatron_sglang.buckets import pack
from megatron_sglang.engine import create_engine
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import (
    EngineDiedError,
    EngineError,
    EngineStaleError,
    EngineStartError,
    EngineTimeoutError,
    WeightSyncError,
)
from megatron_sglang.types import GenerateRequest, SamplingParams

pytestmark = pytest.mark.timeout(200)
WEIGHTS = [("a", torch.arange(12.0).view(3, 4)), ("b", torch.arange(5))]
REQUEST = GenerateRequest((1, 2, 3), SamplingParams(max_new_tokens=8, seed=7))


def publish(engine: HttpEngine, version: int, weights: list[tuple[str, torch.Tensor]] = WEIGHTS) -> str:
    engine.begin_update(version)
    engine.load(pack(version, 0, weights))
    return engine.commit_update(version, 1)


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpEngine]:
    with create_engine(options()) as running:
        with pytest.raises(EngineStaleError, match="no weights were published yet"):
            running.generate([REQUEST])
        yield running


@pytest.fixture
def engine(shared: HttpEngine) -> HttpEngine:
    """A serving engine without faults."""
    script(shared)
    publish(shared, (shared.version or 0) + 1)
    return shared


def test_generation_is_a_function_of_request_and_weights(engine: HttpEngine) -> None:
    """Tests of the cycle rely on it."""
    first, again = engine.generate([REQUEST, REQUEST])
    assert first == again
    assert first.weight_version == engine.version
    assert len(first.token_ids_T) == 8
    assert first.finish_reason == "length"
    stop = SamplingParams(max_new_tokens=8, seed=7, stop_token_ids=(first.token_ids_T[2],))
    [stopped] = engine.generate([GenerateRequest((1, 2, 3), stop)])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids_T == first.token_ids_T[:3]
    publish(engine, (engine.version or 0) + 1, [("a", torch.zeros(3, 4)), ("b", torch.arange(5))])
    assert engine.generate([REQUEST])[0].token_ids_T != first.token_ids_T


class OnAGpu(torch.Tensor):
    """As far as a message of weights can tell."""

    is_cuda = True

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_weights_of_a_gpu_reach_the_fake_by_value(engine: HttpEngine) -> None:
    """It has no GPU: a trainer on one ended at the first update, because the fake could not open its handle."""
    version = (engine.version or 0) + 1
    engine.begin_update(version)
    bucket = pack(version, 0, WEIGHTS)
    engine.load(dataclasses.replace(bucket, data=bucket.data.as_subclass(OnAGpu)))
    engine.commit_update(version, 1)
    assert engine.version == version


def test_failed_update_is_stale_until_the_next_good_one(engine: HttpEngine) -> None:
    """A half-updated engine that went on serving would poison training without an error."""
    version = (engine.version or 0) + 1
    script(engine, {"path": "/update_weights_from_tensor", "do": "flip_bit", "after": 1})
    with pytest.raises(
        WeightSyncError, match=f"weight version {version}, bucket 0, engine rank 0: tensor a has digest"
    ):
        publish(engine, version)
    with pytest.raises(EngineStaleError, match=f"last update failed: weight version {version}, bucket 0"):
        engine.generate([REQUEST])
    with pytest.raises(WeightSyncError, match="no update is open"):
        engine.load(pack(version, 1, WEIGHTS))
    publish(engine, version + 1)
    assert engine.generate([REQUEST])[0].weight_version == version + 1


def test_load_outside_an_update_changes_nothing(engine: HttpEngine) -> None:
    """A caller's mistake must not take a healthy engine out of service."""
    with pytest.raises(WeightSyncError, match=r"no update is open; call begin_update\(99\) first"):
        engine.load(pack(99, 0, WEIGHTS))
    assert engine.generate([REQUEST])


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ({"path": "/generate", "do": "status", "status": 500}, EngineError, "/generate with 500"),
        ({"path": "/generate", "do": "wrong_version"}, EngineError, "weight version 999, expected the published"),
        (
            {"path": "/generate", "do": "sleep", "seconds": 6.0},
            EngineTimeoutError,
            "did not answer /generate within 2 s",
        ),
        (
            {"path": "/flush_cache", "do": "status", "status": 400, "times": 99},
            WeightSyncError,
            "refused for 2 s to flush",
        ),
        ({"path": "/update_weights_from_tensor", "do": "status"}, WeightSyncError, r"version \d+, begin: .* with 500"),
        (
            {"path": "/update_weights_from_tensor", "do": "no_answer"},
            WeightSyncError,
            "begin, engine rank 0: no answer",
        ),
        ({"path": "/continue_generation", "do": "status"}, WeightSyncError, "commit: .*/continue_generation with 500"),
    ],
    ids=lambda value: f"{value['path']} {value['do']}" if isinstance(value, dict) else "",
)
def test_faults_become_named_errors(
    engine: HttpEngine, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Each failure names the route or the step, within its deadline, and the engine can be healed afterwards."""
    short = options(request_timeout_s=2.0, update_timeout_s=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "options", short)
        script(engine, fault)
        with pytest.raises(error, match=message):
            engine.generate([REQUEST]) if fault["path"] == "/generate" else publish(engine, (engine.version or 0) + 1)
    script(engine)
    publish(engine, (engine.version or 0) + 1)
    assert engine.generate([REQUEST])


def test_flush_is_repeated_until_it_succeeds(engine: HttpEngine) -> None:
    """SGLang refuses while a request is ending; an update on top of that would kill it."""
    script(engine, {"path": "/flush_cache", "do": "status", "status": 400, "times": 3})
    publish(engine, (engine.version or 0) + 1)


def test_state_changing_requests_are_never_sent_twice(engine: HttpEngine) -> None:
    """A bucket sent again after an error could be loaded twice, or a CUDA IPC handle opened twice."""
    script(engine, {"path": "/update_weights_from_tensor", "do": "status", "times": 1})
    with pytest.raises(WeightSyncError):
        publish(engine, (engine.version or 0) + 1)


def test_update_aborts_running_requests(engine: HttpEngine) -> None:
    """They end with what they have; nothing waits for them, nothing mixes versions."""
    endless = {"path": "/generate", "do": "sleep", "seconds": 30.0}
    script(engine, endless)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.extend(engine.generate([REQUEST])))
    thread.start()
    asyncio.run(until_running(engine, endless))
    old = engine.version or 0
    publish(engine, old + 1)
    thread.join(20)
    assert [(answer.finish_reason, answer.weight_version) for answer in answers] == [("abort", old)]


def test_release_is_idempotent_and_undone_by_an_update(engine: HttpEngine) -> None:
    """Releasing or resuming twice ends a real engine (and this one)."""
    engine.release()
    engine.release()
    with pytest.raises(EngineStaleError, match="its memory is released"):
        engine.generate([REQUEST])
    version = (engine.version or 0) + 1
    engine.begin_update(version)
    with pytest.raises(WeightSyncError):
        engine.load(pack(version, 7, WEIGHTS))
    engine.release()
    publish(engine, version)
    assert engine.generate([REQUEST])


def test_keys_are_required(engine: HttpEngine) -> None:
    """The fake must not accept what SGLang refuses, or tests against it prove nothing."""
    url = f"http://127.0.0.1:{engine.server.port}"
    user = {"Authorization": f"Bearer {engine.server.api_key}"}
    assert httpx.post(f"{url}/generate", json={}, trust_env=False).status_code == 401
    assert httpx.post(f"{url}/pause_generation", json={}, headers=user, trust_env=False).status_code == 401


def test_death_at_start_shows_the_log(tmp_path: Path) -> None:
    """The reason must be in the error, whether or not a log file was asked for."""
    dying = {"faults": [{"path": "start", "do": "die"}]}
    for log_path in (None, str(tmp_path / "logs" / "engine.log")):
        broken = create_engine(options(extra=dying, log_path=log_path))
        with pytest.raises(EngineStartError, match="scripted death at start"), broken:
            pass


def test_slow_start_meets_its_deadline() -> None:
    """A server that never becomes healthy must not hang the job."""
    slow = {"faults": [{"path": "start", "do": "sleep", "seconds": 60.0}]}
    started = time.monotonic()
    with (
        pytest.raises(EngineStartError, match=r"not healthy after 0\.5 s"),
        create_engine(options(extra=slow, start_timeout_s=0.5)),
    ):
        pass
    assert time.monotonic() - started < 30


def test_death_in_use_is_named_and_leaves_nothing() -> None:
    """The trainer must learn at once that, and why, its engine is gone."""
    with create_engine(options(extra={"faults": [{"path": "/pause_generation", "do": "die"}]})) as mortal:
        folder, port = mortal.server.mailbox.parent, mortal.server.port
        with pytest.raises(
            WeightSyncError, match=r"version 1, begin: EngineDiedError: .*(\n.*)*scripted death"
        ) as caught:
            mortal.begin_update(1)
        assert isinstance(caught.value.__cause__, EngineDiedError)
        with pytest.raises(EngineStaleError):
            mortal.generate([REQUEST])
    assert not folder.exists()
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("killed", ["trainer", "supervisor"])
def test_a_kill_leaves_no_process(killed: str, tmp_path: Path) -> None:
    """SIGKILL lets nobody clean up after itself: the rest of the tree has to notice."""
    code = (
        "import time; from megatron_sglang.engine import EngineOptions, create_engine\n"
        f"e = create_engine(EngineOptions('x', kind='fake', log_path={str(tmp_path / 'log')!r}))\n"
        "e.start(); e.wait_ready()\n"
        "print(e.server.pid, e.server.mailbox.parent, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        pid, folder = trainer.stdout.readline().split()
        tree = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
        assert len(tree) == 2
        os.kill(trainer.pid if killed == "trainer" else int(pid), signal.SIGKILL)
        if killed == "trainer":
            assert psutil.wait_procs(tree, timeout=10)[1] == []
            assert not Path(folder).exists()
        else:
            assert psutil.wait_procs(tree[1:], timeout=10)[1] == []
            shutil.rmtree(folder)  # nobody is left to do it
    finally:
        trainer.kill()
        trainer.wait(10)
