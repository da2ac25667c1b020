"""A real SGLang that somebody else started: with our loader all is proved, by stock routes what SGLang says itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import Weights, engine_options, make_buckets
from methods_tools import Given
from one_rank import Alone
from test_modes_fake import Running, free_port

from megatron_sglang import sync
from megatron_sglang.engine import stock
from megatron_sglang.engine.external import ADMIN_KEY, KEY, ExternalEngine, connect
from megatron_sglang.engine.method_calls import MethodCalls
from megatron_sglang.engine.options import MAILBOX_VARIABLE, server_args
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.sync_methods import DiskPath
from megatron_sglang.types import GenerateRequest, SamplingParams
from megatron_sglang.weights.disk import DiskWriter

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, stop_token_ids=(0,))
REQUESTS = [GenerateRequest((1, 40 + number, 2, 41, 3), GREEDY) for number in range(4)]


@pytest.fixture(scope="module")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = engine_options(tiny_model, tp_size=1)
    port = free_port()
    arguments = server_args(options, port)
    spec = {"kind": "sglang", "api_key": "user", "admin_key": "admin", "port": port}
    known = {name: value for name, value in arguments.items() if name not in ("port", "api_key", "admin_api_key")}
    folder = tmp_path_factory.mktemp("external")
    engine = Running(spec | {"server_args": known}, folder / "mailbox")
    engine.start()
    yield engine
    engine.kill()


def connected(running: Running, tiny_model: Path, *, proved: bool) -> ExternalEngine:
    environment = {KEY: "user", ADMIN_KEY: "admin"}
    if proved:
        environment[MAILBOX_VARIABLE] = str(running.mailbox)
    found = connect(engine_options(tiny_model, tp_size=1), [running.url], environment)
    assert isinstance(found, ExternalEngine)
    return found


def publish(engine: Any, version: int, weights: Weights) -> str:
    buckets = make_buckets(version, weights, 300_000)
    engine.begin_update(version)
    for bucket in buckets:
        engine.load(bucket)
    return engine.commit_update(version, len(buckets))


def test_stock_routes_deliver_the_same_model(
    running: Running, tiny_model: Path, weights: Weights, other_weights: Weights, tmp_path: Path
) -> None:
    """Without our loader nobody counts what arrived; that it is the right model can still be seen by what it says."""
    with connected(running, tiny_model, proved=True) as engine:
        assert not engine.unproved
        digests, answers, sums = [], [], []
        for version, given in ((1, weights), (2, other_weights)):
            digests.append(publish(engine, version, given))
            answers.append([one.token_ids_T for one in engine.generate(REQUESTS)])
            sums.append(stock.checksum(engine.connected, 60.0))
    assert len(set(digests)) == len(set(sums)) == 2
    assert answers[0] != answers[1]
    with connected(running, tiny_model, proved=False) as engine:
        assert "a mailbox folder that both know (MEGATRON_SGLANG_MAILBOX)" in engine.unproved
        for version, given in ((3, other_weights), (4, weights), (5, other_weights)):
            number = int(given is other_weights)
            assert publish(engine, version, given) == sums[number], "SGLang's own sum, as of the proved weights"
            assert [one.token_ids_T for one in engine.generate(REQUESTS)] == answers[number]
            assert engine.served_version() == str(version)
        writer = DiskWriter(Alone(), Given(weights), tmp_path, tiny_model, "float32")
        report = sync.publish(Alone(), engine, DiskPath(Alone(), writer, engine, MethodCalls(engine)), 6)
        assert report.engine_digest == sums[0], "SGLang read the folder itself, and was sent the head that it lacks"
        assert [one.token_ids_T for one in engine.generate(REQUESTS)] == answers[0]
        engine.begin_update(7)
        with pytest.raises(WeightSyncError, match="bucket 1, expected 0"):
            engine.load(make_buckets(7, weights, 300_000)[1])
        publish(engine, 8, weights)
    with connected(running, tiny_model, proved=False) as engine:
        assert publish(engine, 8, other_weights) == sums[1], (
            "a second trainer: SGLang still knows the first one's group"
        )
    with connected(running, tiny_model, proved=True) as engine:
        assert publish(engine, 9, weights) == digests[0], "nothing is left of what others did to it"
