"""Broadcast and external engines against the scriptable engine: the same weights as by the generic path, and faults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import fake_options, script, shared_memory

from megatron_sglang.buckets import pack
from megatron_sglang.engine import create_engines
from megatron_sglang.engine.broadcast import Broadcast
from megatron_sglang.engine.external import ADMIN_KEY, KEY, ExternalEngine, connect
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.options import MAILBOX_VARIABLE
from megatron_sglang.errors import (
    ConfigError,
    EngineError,
    EngineStaleError,
    EngineStartError,
    MegatronSglangError,
    SetupError,
    WeightSyncError,
)
from megatron_sglang.types import GenerateRequest, SamplingParams

pytestmark = pytest.mark.timeout(120)
WEIGHTS = [("a", torch.arange(12.0).view(3, 4)), ("b", torch.arange(5))]
REQUESTS = [GenerateRequest((prompt, 2, 3), SamplingParams(max_new_tokens=4, seed=prompt)) for prompt in range(4)]
LOADER = "/update_weights_from_tensor"


# ---- broadcast ----


@pytest.fixture(scope="module")
def engines() -> Iterator[EngineGroup]:
    """Two engines of two ranks each: a trainer of one rank has no place beside them."""
    group = create_engines(fake_options(update_timeout_s=40.0), 2)
    assert isinstance(group, EngineGroup)
    with group:
        yield group


def next_version(group: EngineGroup) -> int:
    return max(engine.version or 0 for engine in group.engines) + 1


def publish(group: Any, load: Callable[[Any], None], version: int, weights: Any = WEIGHTS) -> str:
    group.begin_update(version)
    for index, named in enumerate(weights):
        load(pack(version, index, [named]))
    return group.commit_update(version, len(weights))


def test_broadcast_leaves_what_the_generic_path_leaves(engines: EngineGroup) -> None:
    """To all ranks of all engines, version after version through one group."""
    link = Broadcast(engines)
    generic = publish(engines, engines.load, next_version(engines))
    for _ in range(2):
        assert publish(engines, link.load, next_version(engines)) == generic
    assert engines.generate(REQUESTS)
    assert not torch.distributed.is_initialized(), "the trainer's own groups are Megatron's business"
    link.close()


FAULTS: dict[str, tuple[Any, str]] = {
    "dies": ({"do": "die"}, r"engine 1: engine died during .*exit code"),
    "refuses": ({"do": "status"}, r"engine 1: .* with 500"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_engine_that_leaves_a_broadcast_ends_it_for_all(engines: EngineGroup, name: str) -> None:
    """The others wait for its ranks, which pass the bytes on; they must not wait until their deadline."""
    fault, text = FAULTS[name]
    link = Broadcast(engines)
    version = next_version(engines)
    engines.begin_update(version)
    link.load(pack(version, 0, WEIGHTS[:1]))
    script(engines.engines[1], {"path": LOADER, **fault})
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=text) as caught:
        link.load(pack(version, 1, WEIGHTS[1:]))
    assert time.monotonic() - began < 15
    engines.fail_update(str(caught.value))
    with pytest.raises(EngineStaleError):
        engines.generate(REQUESTS)
    if engines.why_dead():
        engines.restart()
    generic = publish(engines, engines.load, version + 1)
    assert publish(engines, link.load, version + 2) == generic, "the next version makes a new group"
    link.close()


def test_a_silent_rank_meets_the_deadline(engines: EngineGroup) -> None:
    """Every wait has one, also that for a rank which is alive and does nothing."""
    link = Broadcast(engines)
    version = next_version(engines)
    engines.begin_update(version)
    link.load(pack(version, 0, WEIGHTS[:1]))
    assert link._group is not None
    link._timeout_s = link._group._timeout_s = 1.0
    script(engines.engines[1], {"path": LOADER, "do": "sleep", "seconds": 9.0})
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine [01]: no answer within 1 s"):
        link.load(pack(version, 1, WEIGHTS[1:]))
    assert time.monotonic() - began < 8
    engines.fail_update("test")
    time.sleep(max(0.0, began + 10 - time.monotonic()))  # what it was asked belongs to this version
    link = Broadcast(engines)
    publish(engines, link.load, version + 1)
    link.close()


@pytest.mark.parametrize("change", ["bytes", "order"])
def test_a_broadcast_is_checked_as_any_bucket(engines: EngineGroup, change: str) -> None:
    """Digest of each tensor before it is loaded, and the order."""
    link = Broadcast(engines)
    version = next_version(engines)
    engines.begin_update(version)
    bucket = pack(version, 0, WEIGHTS)
    if change == "bytes":
        bucket.data[1] ^= 4
    else:
        link.load(bucket)
    with pytest.raises(WeightSyncError, match=r"engine rank [01]: .*(bytes changed|dropped, repeated or reordered)"):
        link.load(bucket)
    engines.fail_update("test")
    link.close()


# ---- engines that run already ----


@dataclasses.dataclass
class Running:
    """Somebody else's engine."""

    spec: dict[str, Any]
    mailbox: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.spec['port']}"

    def start(self) -> None:
        self.mailbox.mkdir(mode=0o700, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("external_server.py")), json.dumps(self.spec)],
            env={**os.environ, MAILBOX_VARIABLE: str(self.mailbox)},
            start_new_session=True,
        )

    def kill(self) -> None:
        if self.process is not None:
            shared = shared_memory(self.process.pid)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
            self.process = None
            for path in shared:  # nobody else would: we are its supervisor
                path.unlink(missing_ok=True)

    def connect(self, **changes: Any) -> ExternalEngine:
        environment = {KEY: "user", ADMIN_KEY: "admin", MAILBOX_VARIABLE: str(self.mailbox), **changes}
        options = fake_options(start_timeout_s=30.0, update_timeout_s=40.0, tp_size=1)
        found = connect(options, [self.url], environment)
        assert isinstance(found, ExternalEngine)
        return found


def free_port() -> int:
    """For a server that binds it when it has started: below those that the kernel hands out meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = {"api_key": "user", "admin_key": "admin"}
    spec = {"kind": "fake", "port": free_port(), "tp_size": 2, "script": {}, **keys}
    engine = Running(spec, tmp_path_factory.mktemp("external") / "mailbox")
    engine.start()
    yield engine
    engine.kill()


def test_an_external_engine_is_proved_as_ours(running: Running, engines: EngineGroup) -> None:
    """With our loader in it nothing is less sure; and it stays when the run ends."""
    with running.connect() as engine:
        assert engine.options.tp_size == 2, "its own"
        assert not engine.unproved
        generic = publish(engine, engine.load, 1)
        assert generic == publish(engines, engines.load, next_version(engines))
        assert engine.generate(REQUESTS) == [
            dataclasses.replace(one, weight_version=1) for one in engines.generate(REQUESTS)
        ]
        link = Broadcast(engine)
        assert publish(engine, link.load, 2) == generic
        link.close()
    with running.connect() as again, pytest.raises(EngineStaleError, match="no weights were published yet"):
        again.generate(REQUESTS)


def test_an_external_engine_that_restarts_is_noticed_and_serves_nothing_before_its_weights_are_back(
    running: Running,
) -> None:
    """It would serve its initial weights, whose completions look like any other."""
    with running.connect() as engine:
        link = Broadcast(engine)
        expected = publish(engine, link.load, 7)
        assert engine.why_dead() is None
        running.kill()
        assert "does not answer" in str(engine.why_dead())
        running.start()
        deadline = time.monotonic() + 30
        while "does not answer" in (reason := str(engine.why_dead())):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "serves weight version 'default', published was 7: it was restarted" in reason
        with pytest.raises(EngineError, match="expected the published 7"):
            engine.generate(REQUESTS)
        engine.restart()
        with pytest.raises(EngineStaleError):
            engine.generate(REQUESTS)
        assert publish(engine, link.load, 7) == expected
        assert {one.weight_version for one in engine.generate(REQUESTS)} == {7}
        link.close()


WRONG: dict[str, tuple[dict[str, Any], type[MegatronSglangError], str]] = {
    "key": ({KEY: "other"}, SetupError, rf"refuses the key; set {KEY}"),
    "admin key": ({ADMIN_KEY: "other"}, SetupError, rf"refuses the admin key; set {ADMIN_KEY}"),
    "key file": ({f"{KEY}_FILE": "/nonexistent/key"}, ConfigError, r"KEY_FILE=/nonexistent/key cannot be read"),
    "mailboxes": ({MAILBOX_VARIABLE: "/a:/b"}, ConfigError, r"names 2 folders, engine.external 1 engines"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_user_may_have_wrong(running: Running, name: str) -> None:
    """Each says which variable decides; a key is in none of the texts."""
    changes, kind, text = WRONG[name]
    with pytest.raises(kind, match=text) as caught, running.connect(**changes):
        pass
    assert "other" not in str(caught.value).replace("another", "")


def test_a_wrong_url() -> None:
    """A port where nobody listens, one that is not HTTP's, and no URL at all."""
    nobody = ["http://127.0.0.1:9"]
    with pytest.raises(EngineStartError, match=r"no engine after 0.5 s: http://127.0.0.1:9 does not answer"):
        connect(fake_options(start_timeout_s=0.5), nobody, {}).wait_ready()
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:30000'; expected a URL such as"):
        connect(fake_options(), ["127.0.0.1:30000"], {})


def test_a_key_from_a_file(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("user\n")
    with running.connect(**{KEY: "", f"{KEY}_FILE": str(path)}) as engine:
        assert engine.served_version()


def test_another_sglang_and_no_loader(tmp_path: Path) -> None:
    """Of another version nothing is assumed; without our loader less is proved, and that is said."""
    keys = {"api_key": "user", "admin_key": "admin"}
    described = {"custom_weight_loader": None}
    spec = {"kind": "fake", "port": free_port(), "tp_size": 1, "script": {"server_info": described}, **keys}
    one = Running(spec, tmp_path / "mailbox")
    one.start()
    try:
        with one.connect() as engine:
            assert "runs without our loader: that each of its ranks holds every weight bit for bit is not" in (
                engine.unproved
            )
            with pytest.raises(WeightSyncError, match="the direct path needs our loader"):
                engine.layout({})
        with one.connect(**{MAILBOX_VARIABLE: ""}) as engine:
            assert engine.unproved
        one.kill()
        one.spec["script"] = {"server_info": {"moe_runner_backend": "auto", "quantization": "fp8"}}
        one.start()
        # What our loader proves are the weights before SGLang has changed them.
        with pytest.raises(SetupError, match=r"runs with quantization='fp8': SGLang changes or moves"), one.connect():
            pass
        one.kill()
        one.spec["script"] = {"server_info": {"version": "0.4.0"}}
        one.start()
        with pytest.raises(SetupError, match=r"runs SGLang 0\.4\.0, this package speaks to 0\.5"), one.connect():
            pass
    finally:
        one.kill()
