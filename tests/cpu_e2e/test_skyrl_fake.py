"""SkyRL's interface against the scriptable engine: what calls do to running requests, and when nothing is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engine_tools import fake_options, script, until_running

from megatron_sglang.engine import create_engine
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.skyrl import SGLangInferenceEngine
from megatron_sglang.errors import ConfigError, EngineError, EngineStaleError, EngineTimeoutError, WeightSyncError
from megatron_sglang.types import GenerateRequest, SamplingParams

pytestmark = pytest.mark.timeout(120)
TENSORS = {"model.layers.0.b": torch.arange(12.0).view(3, 4), "model.a": torch.arange(5.0)}


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def apply_chat_template(self, conversation: Any, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode("".join(message["content"] for message in conversation))}


def update(weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> dict[str, Any]:
    weights = weights or TENSORS
    dtypes = [str(tensor.dtype) for tensor in weights.values()]
    shapes = [list(tensor.shape) for tensor in weights.values()]
    return {"names": list(weights), "dtypes": dtypes, "shapes": shapes, "tensors": list(weights.values())} | changes


def batch(*prompts: list[int], **params: Any) -> dict[str, Any]:
    known = {"max_generate_length": 8, "temperature": 1.0, "seed": 3, "logprobs": 0}
    return {"prompt_token_ids": list(prompts) or [[1, 2, 3]], "sampling_params": known | params}


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpEngine]:
    with create_engine(fake_options(update_timeout_s=60.0)) as running:
        yield running


@pytest.fixture
def engine(shared: HttpEngine) -> HttpEngine:
    script(shared)
    return shared


def run[T](engine: HttpEngine, work: Callable[[SGLangInferenceEngine], Awaitable[T]]) -> T:
    """With weights published, and all but the engine closed afterwards."""

    async def main() -> T:
        skyrl = SGLangInferenceEngine(engine, Letters())
        try:
            await skyrl.update_named_weights(update())
            return await work(skyrl)
        finally:
            if skyrl._client is not None:
                await skyrl._client.aclose()
            if skyrl._broadcast is not None:
                skyrl._broadcast.close()

    return asyncio.run(main())


def test_generate_speaks_skyrls_dictionaries(engine: HttpEngine) -> None:
    """Keys, order, aligned logprobs; equal prompts of a batch differ although the batch has one seed."""

    async def work(skyrl: SGLangInferenceEngine) -> tuple[dict[str, Any], dict[str, Any]]:
        found = await skyrl.generate(batch([1, 2], [1, 2], [3]) | {"session_ids": ["x", "x", None]})
        stop = found["responses"][0][2:4]
        return found, await skyrl.generate(batch([1, 2], stop=[stop], logprobs=None))

    found, stopped = run(engine, work)
    assert (len(found["responses"]), len(found["response_ids"])) == (3, 3)
    assert found["responses"] == [Letters().decode(ids) for ids in found["response_ids"]]
    assert [len(ids) for ids in found["response_ids"]] == [len(logprobs) for logprobs in found["response_logprobs"]]
    assert found["stop_reasons"] == ["length"] * 3
    assert found["response_ids"][0] != found["response_ids"][1]
    assert stopped["stop_reasons"] == ["stop"]
    assert stopped["responses"] == [found["responses"][0][:4]]
    assert stopped["response_logprobs"] is None


def test_completions_in_openais_shape(engine: HttpEngine) -> None:
    """SkyRL's HTTP endpoint passes bodies through."""
    body = {"model": "m", "prompt": "bc", "max_tokens": 8, "seed": 3, "n": 2, "session_id": "s"}
    chat = {key: value for key, value in body.items() if key != "prompt"} | {
        "messages": [{"role": "user", "content": "bc"}]
    }

    async def work(skyrl: SGLangInferenceEngine) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        with pytest.raises(ConfigError, match="stream=True"):
            await skyrl.completion({"json": body | {"stream": True}})
        found = await skyrl.generate(batch([1, 2]))
        return await skyrl.completion({"json": body, "headers": {}}), await skyrl.chat_completion(chat), found

    text, message, found = run(engine, work)
    assert [choice["text"] for choice in text["choices"]] == [c["message"]["content"] for c in message["choices"]]
    assert text["choices"][0]["text"] == found["responses"][0]
    assert text["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}
    assert text["weight_version"] == engine.version


def test_logprobs_that_are_asked_for_are_given(engine: HttpEngine) -> None:
    """A body with logprobs and an answer without them trains on nothing; each names the sampled tokens, in order."""
    asked = {"max_completion_tokens": 8, "seed": 3, "stop": None}
    chat = asked | {"messages": [{"role": "user", "content": "bc"}], "logprobs": True, "top_logprobs": 2, "n": None}

    async def work(skyrl: SGLangInferenceEngine) -> list[dict[str, Any]]:
        with pytest.raises(ConfigError, match="top_logprobs=2 needs logprobs=True"):
            await skyrl.chat_completion(chat | {"logprobs": False})
        with pytest.raises(ConfigError, match="logprobs=True; expected 0, or how many"):
            await skyrl.generate(batch([1, 2], logprobs=True))
        return [
            await skyrl.generate(batch([1, 2], logprobs=2)),
            await skyrl.chat_completion(chat),
            await skyrl.completion({"json": asked | {"prompt": "bc", "logprobs": 2}}),
            await skyrl.completion({"json": asked | {"prompt": "bc"}}),
        ]

    found, message, text, silent = run(engine, work)
    [ids], [logprobs], [top] = (found[f"response_{name}"] for name in ("ids", "logprobs", "top_logprobs"))
    names = [Letters().decode([token]) for token in ids]
    assert [len(row) for row in top] == [2] * 8
    content = message["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == names
    assert [one["logprob"] for one in content] == logprobs
    assert [[one["logprob"] for one in row["top_logprobs"]] for row in content] == [list(row.values()) for row in top]
    shown = text["choices"][0]["logprobs"]
    assert (shown["tokens"], shown["token_logprobs"]) == (names, logprobs)
    assert "".join(shown["tokens"][3:]) == text["choices"][0]["text"][shown["text_offset"][3] :]
    assert silent["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("tags", [None, ["weights"], ["kv_cache"]])
def test_after_sleep_nothing_is_served_until_weights_are_verified(engine: HttpEngine, tags: list[str] | None) -> None:
    """Memory that was given back holds noise; a server that woke up would answer with it."""

    async def work(skyrl: SGLangInferenceEngine) -> None:
        await skyrl.sleep(tags)
        await skyrl.sleep(tags)  # what sleeps is left alone: releasing twice ends SGLang
        for wake in (["kv_cache"], None, None):
            with pytest.raises(EngineStaleError, match="it sleeps"):
                await skyrl.generate(batch())
            with pytest.raises(EngineStaleError, match="it sleeps"):
                await skyrl.resume_generation()
            await skyrl.wake_up(wake)
        with pytest.raises(EngineStaleError, match="it sleeps"):
            await skyrl.generate(batch())
        await skyrl.update_named_weights(update())
        await skyrl.wake_up(["kv_cache"])
        assert (await skyrl.generate(batch()))["weight_versions"] == [engine.version]

    run(engine, work)
    with pytest.raises(ConfigError, match=r"memory tags .*'wieghts'"):
        engine.sleep(["wieghts"])


@pytest.mark.parametrize(
    ("abort_first", "drain", "ends"), [(True, 5.0, "abort"), (False, 20.0, "length"), (False, 0.2, "abort")]
)
def test_sleep_aborts_or_drains(engine: HttpEngine, abort_first: bool, drain: float, ends: str) -> None:
    """A drained request is whole; an aborted one returns what it has; none keeps the engine from sleeping."""
    script(engine, token_s=0.3)

    async def work(skyrl: SGLangInferenceEngine) -> dict[str, Any]:
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=16)))
        await until_running(engine, token_s=0.3)
        await asyncio.sleep(1.0)
        started = time.monotonic()
        await skyrl.sleep(abort_first=abort_first, drain_timeout=drain)
        assert time.monotonic() - started < drain + 5
        return await running

    found = run(engine, work)
    assert found["stop_reasons"] == [ends]
    assert (len(found["response_ids"][0]) == 16) == (ends == "length")
    assert found["response_ids"][0]


def test_sleep_drains_by_default_as_long_as_skyrl_says(engine: HttpEngine) -> None:
    """SGLang waits for /flush_cache as long as it is asked to. Who gives up at the same moment gets no answer, and
    reports an engine that hangs where only a request is long."""
    script(engine, token_s=0.1)

    async def work(skyrl: SGLangInferenceEngine) -> None:
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=1000)))
        await until_running(engine, token_s=0.1)
        started = time.monotonic()
        await skyrl.sleep(["kv_cache"], abort_first=False, drain_timeout=2.0)
        assert 2.0 <= time.monotonic() - started < 20  # of 100 s
        assert (await running)["stop_reasons"] == ["abort"]
        script(engine, token_s=0.1)
        await skyrl.update_named_weights(update())
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=1000)))
        await until_running(engine, token_s=0.1)
        with pytest.raises(EngineTimeoutError, match=r"refused for 1\.5 s to flush .*a request may be stuck"):
            engine.reset_prefix_cache(timeout_s=1.5)
        await skyrl.abort_generation()
        await running

    run(engine, work)


def test_the_deadline_of_sleep_is_that_of_all_its_steps(engine: HttpEngine) -> None:
    """Three slow answers, each within the time, took three times as long. Memory whose release was not waited for is
    given back all the same, and asking twice ends SGLang."""
    paths = ("/pause_generation", "/flush_cache", "/release_memory_occupation")

    async def work(skyrl: SGLangInferenceEngine) -> None:
        for seconds, message in (
            (3.2, "/release_memory_occupation within"),
            (4.8, "did not answer /flush_cache within"),
        ):
            script(engine, *({"path": path, "do": "sleep", "seconds": seconds} for path in paths))
            started = time.monotonic()
            with pytest.raises(EngineTimeoutError, match=message):
                await skyrl.sleep(timeout=8.0)
            assert 7.9 < time.monotonic() - started < 20
            await asyncio.sleep(6.0)  # SGLang's schedulers take one message after the other
            script(engine)
            await skyrl.sleep()
            await skyrl.update_named_weights(update())
            assert (await skyrl.generate(batch()))["weight_versions"] == [engine.version]

    run(engine, work)


def test_sleep_meets_its_deadline(engine: HttpEngine) -> None:
    """An engine that never gets idle must not hang the trainer; it stays out of service."""

    async def work(skyrl: SGLangInferenceEngine) -> None:
        script(engine, {"path": "/flush_cache", "do": "status", "status": 400, "times": 99})
        with pytest.raises(EngineTimeoutError, match="refused for 2 s to flush"):
            await skyrl.sleep(timeout=2.0)
        script(engine)
        with pytest.raises(EngineStaleError):
            await skyrl.generate(batch())

    run(engine, work)


@pytest.mark.parametrize(("mode", "ends"), [("abort", "abort"), ("in_place", "length"), ("retract", "length")])
def test_pause_and_resume(engine: HttpEngine, mode: Any, ends: str) -> None:
    """What runs ends, or waits and goes on; what comes meanwhile waits and is not lost."""
    script(engine, token_s=0.15)

    async def work(skyrl: SGLangInferenceEngine) -> None:
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=20)))
        await until_running(engine, token_s=0.15)
        await skyrl.pause_generation(mode)
        waiting = asyncio.create_task(skyrl.generate(batch()))
        await asyncio.sleep(1.5)
        assert running.done() == (mode == "abort")
        assert not waiting.done()
        await skyrl.resume_generation()
        assert (await running)["stop_reasons"] == [ends]
        assert (await waiting)["stop_reasons"] == ["length"]

    run(engine, work)


def test_abort_generation_and_cache(engine: HttpEngine) -> None:
    """Aborted requests return, the engine serves on, and its cache can be emptied."""
    script(engine, token_s=0.05)

    async def work(skyrl: SGLangInferenceEngine) -> None:
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=1000)))
        await until_running(engine, token_s=0.05)
        await skyrl.abort_generation()
        assert (await running)["stop_reasons"] == ["abort"]
        await skyrl.reset_prefix_cache()
        assert (await skyrl.generate(batch()))["stop_reasons"] == ["length"]

    run(engine, work)


def test_adapters_by_name(engine: HttpEngine) -> None:
    """An adapter that is not loaded is an error, not the base model's answer; nor does a request load it again, as it
    would in SGLang, which remembers the folder of every name."""
    request = GenerateRequest((1, 2), SamplingParams(max_new_tokens=2, seed=1), adapter="mine")

    async def work(skyrl: SGLangInferenceEngine) -> None:
        await skyrl.load_lora_adapter("mine", "/folder", pinned=True)
        base, mine = await skyrl.generate(batch()), await skyrl.generate(batch() | {"lora_name": "mine"})
        assert base["response_ids"] != mine["response_ids"]
        by_call = engine.generate([request])
        with pytest.raises(EngineError, match="never been loaded: other"):
            await skyrl.generate(batch() | {"lora_name": "other"})
        await skyrl.unload_lora_adapter("mine")
        with pytest.raises(EngineError, match="'mine' was unloaded"):
            await skyrl.generate(batch() | {"lora_name": "mine"})
        with pytest.raises(EngineError, match="'mine' was unloaded"):
            engine.generate([request])
        await skyrl.load_lora_adapter("mine", "/folder")
        assert engine.generate([request]) == by_call
        assert (await skyrl.generate(batch() | {"lora_name": "mine"}))["response_ids"] == mine["response_ids"]

    run(engine, work)


@pytest.mark.parametrize("broadcast", [False, True])
def test_weights_are_replaced_as_a_whole_or_not(engine: HttpEngine, broadcast: bool) -> None:
    """By both ways: the same digest, whatever the order of names; a failed update serves nothing."""
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}

    async def work(skyrl: SGLangInferenceEngine) -> None:
        before = await skyrl.generate(batch())
        if broadcast:
            with pytest.raises(ConfigError, match="world_size=9, expected 3"):
                await skyrl.init_weight_update_communicator({"world_size": 9})
            with pytest.raises(ConfigError, match=r"backend='ncll' is none, expected nccl or gloo or broadcast"):
                await skyrl.init_weight_update_communicator({"backend": "ncll"})
            await skyrl.init_weight_update_communicator({"backend": "nccl", "master_port": 1, "group_name": "skyrl"})
            with pytest.raises(ConfigError, match=r"model\.a is on cpu, expected cuda by the backend"):
                await skyrl.update_named_weights(update(other))
            await skyrl.generate(batch())
            await skyrl.init_weight_update_communicator({"world_size": 3, "rank_offset": 1, "backend": "gloo"})
        changed = await skyrl.update_named_weights(update(other))
        assert (await skyrl.generate(batch()))["response_ids"] != before["response_ids"]
        with pytest.raises(WeightSyncError, match=r"model\.a"):
            await skyrl.update_named_weights(update({name: TENSORS[name] for name in list(TENSORS)[:1]}))
        with pytest.raises(EngineStaleError):
            await skyrl.generate(batch())
        turned = dict(reversed(TENSORS.items()))
        digests = [await skyrl.update_named_weights(update(turned, tensors=one)) for one in (TENSORS, turned)]
        assert len({*digests, changed}) == 2
        assert (await skyrl.generate(batch()))["response_ids"] == before["response_ids"]

    run(engine, work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": None}, "has no tensors"),
        ({"tensors": TENSORS | {"b": torch.ones(1)}}, r"\['b'\] are in names or in tensors alone, expected in both"),
        ({"names": ["model.a"]}, "1 different names, 2 dtypes, 2 shapes and 2 tensors"),
        ({"shapes": [[3, 4], [6]]}, "model.a is .*announced as"),
        ({"dtypes": ["bfloat16", "float32"]}, "model.layers.0.b is .*announced as"),
    ],
)
def test_wrong_weight_requests_change_nothing(engine: HttpEngine, changes: dict[str, Any], message: str) -> None:
    """A mistake of the caller is found before the engine is taken out of service."""

    async def work(skyrl: SGLangInferenceEngine) -> None:
        with pytest.raises(ConfigError, match=message):
            await skyrl.update_named_weights(update(**changes))
        await skyrl.generate(batch())

    run(engine, work)


def test_teardown_leaves_nothing() -> None:
    """With a request running; a second time it does nothing."""

    async def main() -> None:
        engine = create_engine(fake_options(update_timeout_s=60.0, extra={"token_s": 0.05}))
        engine.start()
        await asyncio.to_thread(engine.wait_ready)
        skyrl = SGLangInferenceEngine(engine, Letters())
        assert (skyrl.tp_size(), skyrl.pp_size(), skyrl.dp_size(), skyrl.ep_size()) == (2, 1, 1, 1)
        await skyrl.update_named_weights(update())
        running = asyncio.create_task(skyrl.generate(batch(max_generate_length=1000)))
        await until_running(engine, token_s=0.05)
        await skyrl.teardown()
        assert (await running)["stop_reasons"] == ["abort"]
        assert engine.why_dead()
        await skyrl.teardown()

    asyncio.run(main())
