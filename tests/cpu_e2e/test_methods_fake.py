"""Sync methods against two scriptable engines that are updated as one: all of them serve a version, or none."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_tools import fake_options, script
from methods_tools import Drawn, Given, draw
from one_rank import Alone

from megatron_sglang.engine.beacon import NAME, Beacon, Watch
from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.group import EngineGroup, spread
from megatron_sglang.engine.method_calls import MethodCalls
from megatron_sglang.errors import EngineStaleError, WeightSyncError
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.upstream import Upstream
from megatron_sglang.sync import GenericPath, publish
from megatron_sglang.sync_methods import AdapterPath, DiskPath, RestartPath
from megatron_sglang.training import modes
from megatron_sglang.types import GenerateRequest, SamplingParams
from megatron_sglang.weights.disk import DiskWriter

pytestmark = pytest.mark.timeout(60)

TINY = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"
WEIGHTS = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.full((4, 6), 1.0 + layer) for layer in range(3)}
REQUESTS = [GenerateRequest((1, 2, number), SamplingParams(max_new_tokens=4, seed=number)) for number in range(4)]


@pytest.fixture
def engine() -> Iterator[EngineGroup]:
    options = dataclasses.replace(fake_options(tp_size=2, update_timeout_s=40.0), model_path=str(TINY))
    with EngineGroup(spread(options, 2)) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"dtype": "float32"}')
    return tmp_path / "model"


@pytest.mark.parametrize("kind", [DiskPath, RestartPath])
def test_a_folder_is_served_by_all_engines_or_by_none(engine, model, tmp_path, kind):
    """One engine that could not read its folder takes the others with it; the next version heals all."""
    given = Given(WEIGHTS, limit=100)
    path = kind(Alone(), DiskWriter(Alone(), given, tmp_path / "home", model, "float32"), engine, MethodCalls(engine))
    by_buckets = publish(Alone(), engine, GenericPath(Alone(), given, engine), 1)
    processes = [one.server.pid for one in engine.engines]
    report = publish(Alone(), engine, path, 2)
    assert report.engine_digest == by_buckets.engine_digest
    assert (report.tensors, report.buckets) == (3, 3)
    assert ([one.server.pid for one in engine.engines] != processes) == (kind is RestartPath)
    before = engine.generate(REQUESTS)
    script(engine.engines[-1], {"path": "/update_weights_from_tensor", "do": "no_answer", "after": 1})
    if kind is DiskPath:
        with pytest.raises(WeightSyncError, match=r"version 3, folder, engine rank 0: no answer from the loader"):
            publish(Alone(), engine, path, 3)
        with pytest.raises(EngineStaleError):
            engine.generate(REQUESTS)
        assert publish(Alone(), engine, path, 3).engine_digest == report.engine_digest
        assert [one.token_ids_T for one in engine.generate(REQUESTS)] == [one.token_ids_T for one in before]


def test_random_weights_are_served_under_adapters_from_a_folder(engine, model, tmp_path):
    """The base is sent once; each adapter changes the answers, and a request that names none gets the newest."""
    adapters = Drawn(draw(WEIGHTS, ("q_proj",), 1), tmp_path / "home", str(model))
    base = DiskWriter(Alone(), Given(WEIGHTS), tmp_path / "home", model, "float32", name="base")
    path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(model), base=base)
    with pytest.raises(EngineStaleError, match="the base alone is not the policy"):
        engine.generate(REQUESTS)
    answers = []
    for version in (1, 2, 2):
        adapters.pairs = draw(WEIGHTS, ("q_proj",), version)
        report = publish(Alone(), engine, path, version)
        assert report.tensors == 6
        assert {one.adapter for one in engine.engines} == {f"policy-v{version}"}
        answers.append([one.token_ids_T for one in engine.generate(REQUESTS)])
        assert engine.stale == "", "a client of the group asks the group"
    assert answers[0] != answers[1] == answers[2]
    assert {one.options.model_path for one in engine.engines} == {str((tmp_path / "home" / "base").resolve())}


def test_an_adapter_that_one_engine_refuses_is_served_by_none(engine, model, tmp_path):
    adapters = Drawn(draw(WEIGHTS, ("q_proj",), 1), tmp_path / "home", str(model))
    publish(Alone(), engine, GenericPath(Alone(), Given(WEIGHTS), engine), 1)
    path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(model))
    publish(Alone(), engine, path, 2)
    script(engine.engines[-1], {"path": "/load_lora_adapter", "do": "status", "status": 400})
    with pytest.raises(WeightSyncError, match=r"weight version 3, adapter policy-v3: .* with 400"):
        publish(Alone(), engine, path, 3)
    with pytest.raises(EngineStaleError):
        engine.generate(REQUESTS)
    publish(Alone(), engine, path, 3)
    assert {one.weight_version for one in engine.generate(REQUESTS)} == {3}


@pytest.mark.parametrize("tags", [None, ["kv_cache"]], ids=["all", "cache"])
@pytest.mark.parametrize("forgets", [False, True], ids=["host", "gpu"])
def test_memory_that_was_released_comes_back_with_the_next_adapters(engine, model, tmp_path, tags, forgets):
    """They would be served by an engine without its cache, over a base that is gone on a GPU. There the engine is
    started on its folder again; where all is as it was it goes on, and may be put to sleep again."""
    adapters = Drawn(draw(WEIGHTS, ("q_proj",), 1), tmp_path / "home", str(model))
    base = DiskWriter(Alone(), Given(WEIGHTS), tmp_path / "home", model, "float32", name="base")
    path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(model), base=base)
    first = publish(Alone(), engine, path, 1)
    processes = [one.server.pid for one in engine.engines]
    for version in (2, 3):
        for one in engine.engines:
            script(one, *([{"path": "/resume_memory_occupation", "do": "forget"}] if forgets else []))
            one.sleep(tags)
        report = publish(Alone(), engine, path, version)
        assert report.engine_digest == first.engine_digest
        assert [one.released for one in engine.engines] == [set(), set()]
        assert {one.weight_version for one in engine.generate(REQUESTS)} == {version}
    anew = [one.server.pid not in processes for one in engine.engines]
    assert anew == [forgets and tags is None] * 2


@pytest.mark.parametrize("how", ["generate", "stream", "endpoint"])
def test_a_request_that_was_held_does_not_pass_for_the_new_adapters(engine, model, tmp_path, how):
    """It came just after the pause, with the old adapter's name: the old adapter samples it when the engine goes on,
    under the new version."""
    adapters = Drawn(draw(WEIGHTS, ("q_proj",), 1), tmp_path / "home", str(model))
    publish(Alone(), engine, GenericPath(Alone(), Given(WEIGHTS), engine), 1)
    path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(model))
    publish(Alone(), engine, path, 2)
    engine.announce(tmp_path / "engine.json")
    request = GenerateRequest((1, 2, 3), SamplingParams(max_new_tokens=4))

    async def late(client: EngineClient) -> None:
        async with contextlib.aclosing(client.stream(request)) as pieces:
            engine.on_each(lambda one: one.pause())  # as `begin_adapter` begins, an instant after `refuse` was asked
            held = asyncio.ensure_future(anext(pieces) if how == "stream" else client.generate(request))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(publish, Alone(), engine, path, 3)
            await held

    async def run() -> None:
        if how == "endpoint":
            upstream = Upstream(tmp_path / "engine.json", Limits())
            async with contextlib.aclosing(upstream), upstream.use() as bound:
                await late(bound.client)
        else:
            async with engine.client() as client:
                await late(client)

    with pytest.raises(EngineStaleError, match=r"until weight version 3 .* 'policy-v2', which is version 2"):
        asyncio.run(run())


def test_what_an_update_of_adapters_ends_keeps_its_version(engine, model, tmp_path):
    """It was sampled before: by the adapter whose version it says."""
    adapters = Drawn(draw(WEIGHTS, ("q_proj",), 1), tmp_path / "home", str(model))
    publish(Alone(), engine, GenericPath(Alone(), Given(WEIGHTS), engine), 1)
    path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(model))
    publish(Alone(), engine, path, 2)
    for one in engine.engines:
        script(one, token_s=0.02)

    async def running() -> tuple[str, int, int]:
        async with engine.client() as client:
            found = asyncio.ensure_future(
                client.generate(GenerateRequest((1, 2, 3), SamplingParams(max_new_tokens=400)))
            )
            await asyncio.sleep(0.5)
            await asyncio.to_thread(publish, Alone(), engine, path, 3)
            done = await found
            return done.finish_reason, done.weight_version, min(len(done.token_ids_T), 1)

    assert asyncio.run(running()) == ("abort", 2, 1)


def test_weights_that_engines_have_loaded_themselves_are_announced_to_nobody(model, tmp_path, monkeypatch):
    """They are the base, or another version; an endpoint that waits for the engine takes the first moment it may."""
    writer = DiskWriter(Alone(), Given(WEIGHTS), tmp_path / "home", model, "float32")
    loaded = {"model_path": writer.write(1).path, "load_format": "auto"}
    group = EngineGroup(spread(dataclasses.replace(fake_options(tp_size=2, update_timeout_s=40.0), **loaded), 2))
    announced, write = [], Beacon._write
    monkeypatch.setattr(Beacon, "_write", lambda self, sign: (announced.append(sign.reason), write(self, sign))[1])
    with contextlib.closing(group):
        group.start()
        group.announce(tmp_path / NAME)
        modes.wait_ready(group, print)
        assert Watch(tmp_path / NAME).sign().reason == "no version of the policy was published yet"
        group.engines[0].restart()
        assert "" not in announced
        publish(Alone(), group, GenericPath(Alone(), Given(WEIGHTS), group), 1)
        assert Watch(tmp_path / NAME).sign().reason == ""
