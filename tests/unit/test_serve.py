"""The endpoint's parts that need no engine: who may use one, in which order requests run, keys, seeds, records."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from megatron_sglang.config_load import load_config
from megatron_sglang.engine.beacon import NAME, Announced, Watch
from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.errors import ConfigError, DataError, EngineError
from megatron_sglang.serve import command, http, keys
from megatron_sglang.serve.answers import Form, Sampled
from megatron_sglang.serve.app import Endpoint
from megatron_sglang.serve.gate import Deadlines, Gate
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.records import ChatRequest, CompletionRequest
from megatron_sglang.serve.refusal import Refusal
from megatron_sglang.serve.tokens import Tokens, _bytes_by_character
from megatron_sglang.serve.work import Version, _merged, choice_seed, requests_of
from megatron_sglang.types import Completion, SamplingParams

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"

# ---- who may use an engine ----


class Owner(Announced):
    """What `announce` asks of an engine."""

    def __init__(self) -> None:
        self.options = EngineOptions("model", kind="fake")
        self.server: Any = type("Server", (), {"port": 1, "api_key": "secret"})
        self.version: int | None = None
        self.stale = "no weights were published yet"


def reason(watch: Watch) -> str:
    try:
        return watch.sign().reason
    except EngineError as error:
        return str(error)


def test_a_reader_sees_each_change(tmp_path: Path) -> None:
    """Two changes within one tick of the file system's clock look like none by the file's own times."""
    owner, watch = Owner(), Watch(tmp_path / NAME)
    assert "no engine is announced" in reason(watch)
    owner.announce(tmp_path / NAME)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    for version in range(200):
        owner.stale = f"update to {version}"
        assert reason(watch) == f"update to {version}"
        owner.version, owner.stale = version, ""
        assert (reason(watch), watch.sign().version) == ("", version)
    owner._withdraw()
    assert "no engine is announced" in reason(watch)
    owner.stale = "it was started again"
    assert reason(watch) == "it was started again"


def test_one_of_several_engines_takes_all_out(tmp_path: Path) -> None:
    """An engine that has committed must not be used before the others have, and their digests agree."""
    group, members = Owner(), [Owner(), Owner()]
    group.engines = members
    group.announce(tmp_path / NAME)
    watch = Watch(tmp_path / NAME)
    assert len(watch.sign().addresses) == 2
    for one in (*members, group):
        assert reason(watch) == "no weights were published yet"
        one.stale = ""
    assert reason(watch) == ""
    members[1].stale = "its memory is released"
    assert reason(watch) == "its memory is released"


def test_what_is_not_the_owners_is_not_believed(tmp_path: Path) -> None:
    """A file that others may write could send prompts anywhere; one of a process that is gone, to whoever has its
    port now."""
    owner, path = Owner(), tmp_path / NAME
    owner.stale = ""
    owner.announce(path)
    record = json.loads(path.read_text())
    path.chmod(0o666)
    assert "with mode 666" in reason(Watch(path))
    path.chmod(0o600)
    assert reason(Watch(path)) == ""
    for changes, expected in (
        ({"started": record["started"] - 1}, "is gone"),
        ({"pid": 2**22 + 1}, "is gone"),
        ({"format": 2}, "format 2"),
        ({"addresses": [{"url": "x"}]}, "not what an engine's owner writes"),
    ):
        path.write_text(json.dumps(record | changes))
        assert expected in reason(Watch(path))
    path.write_text("{")
    assert "is not JSON" in reason(Watch(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_change_that_cannot_be_told_takes_the_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not leave "serving" behind while an update runs, nor stop the update."""
    owner, watch = Owner(), Watch(tmp_path / NAME)
    owner.stale = ""
    owner.announce(tmp_path / NAME)
    really = os.open
    monkeypatch.setattr(
        "os.open", lambda path, *more: really("/dev/full" if "engine" in str(path) else path, *more[:0], os.O_WRONLY)
    )
    owner.stale = "update"
    assert "no engine is announced" in reason(watch)
    monkeypatch.undo()
    owner.stale = "another update"
    assert reason(watch) == "another update"


# ---- order and ends ----


def test_places_are_given_in_order_and_returned() -> None:
    """A request of many choices that small ones overtake for ever; places that leave with who gave up waiting."""

    async def run() -> list[str]:
        gate, order = Gate(4, 10), list[str]()

        async def use(name: str, choices: int, seconds: float = 0.01) -> None:
            async with gate.admit(choices):
                order.append(name)
                await asyncio.sleep(seconds)

        tasks = [asyncio.create_task(use(*one)) for one in (("a", 3), ("large", 4), ("b", 1), ("c", 1), ("d", 2))]
        await asyncio.sleep(0)
        assert (gate.taken, gate.waiting) == (3, 4)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.taken, gate.waiting) == (0, 0)
        holders = [asyncio.create_task(use("x", 4, 10)), *(asyncio.create_task(use("y", 1)) for _ in range(10))]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="10 requests are waiting") as refused:
            await use("z", 1)
        assert refused.value.status == 429
        for task in reversed(holders):
            task.cancel()
        await asyncio.gather(*holders, return_exceptions=True)
        assert (gate.taken, gate.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "large", "b", "d", "x"]


def test_requests_end_by_time_and_together() -> None:
    """A cancelled task must stay cancelled: only our own ends become refusals."""

    async def run() -> None:
        async def wait(deadlines: Deadlines) -> None:
            async with deadlines.bound():
                await asyncio.sleep(10)

        with pytest.raises(Refusal, match=r"within 0\.01 s"):
            await wait(Deadlines(0.01))
        deadlines = Deadlines(10)
        tasks = [asyncio.create_task(wait(deadlines)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        deadlines.end_all("closing")
        cancelled, *ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(cancelled, asyncio.CancelledError)
        assert [str(one) for one in ended] == ["no completions now: closing"] * 2
        assert len(deadlines) == 0

    asyncio.run(run())


# ---- what an answer is made of ----


def test_versions_do_not_mix() -> None:
    """Within one completion, between choices, and in pieces without tokens, which have none."""

    def of(version: int, finish: Any = "stop", **more: Any) -> Completion:
        return Completion((1, 2), (0.0, 0.0), finish, version, **more)

    seen = Version()
    for one in (of(3), of(-1), of(3)):
        seen.see(one)
    assert seen.number == 3
    for other in (of(4), of(3, versions_T=(2, 3)), of(3, "abort")):
        with pytest.raises(Refusal) as refused:
            seen.see(other)
        assert refused.value.status == 503


@pytest.mark.parametrize("choices", [1, 2])
def test_a_stream_ends_with_whatever_a_choice_ends_in(choices: int) -> None:
    """What is not an error of the engine's, such as a tokenizer's, left a stream of several choices silent for its ten
    minutes."""

    class Client:
        async def stream(self, _: Any) -> AsyncGenerator[Any]:
            raise IndexError("piece id is out of range")
            yield

    async def read() -> None:
        async with asyncio.timeout(5):
            requests = requests_of([(1,)], choices, SamplingParams(), None, "")
            async for _ in _merged(Client(), requests):  # pyright: ignore
                pass

    with pytest.raises(IndexError):
        asyncio.run(read())


def test_choices_have_seeds_of_their_own() -> None:
    """With seed + n, requests of seeds 1 and 2 would share all but one of their samples."""
    assert choice_seed(7, 0) == 7
    seeds = {choice_seed(seed, number) for seed in range(-50, 50) for number in range(16)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**31 for seed in seeds)
    requests = requests_of([(1,), (2,)], 2, SamplingParams(), 7, "s")
    assert [one.token_ids_T for one in requests] == [(1,), (1,), (2,), (2,)]
    assert len({one.sampling.seed for one in requests}) == 4
    free = [requests_of([(1,)], 1, SamplingParams(), None, "")[0].sampling.seed for _ in range(4)]
    assert len(set(free)) == 4


class Bytes:
    """A tokenizer whose tokens 0-255 are bytes."""

    def __len__(self) -> int:
        return 256

    def convert_ids_to_tokens(self, token: int) -> str:
        return {byte: character for character, byte in _bytes_by_character().items()}[token]


def test_logprobs_are_json_whatever_the_tokens() -> None:
    """Halves of characters and the logarithm of 0 have no place in JSON."""
    tokens = Tokens(Path("m"), Bytes(), 300, 10, (), _bytes_by_character())
    assert tokens.name(ord(" ")) == (" ", [32])
    assert tokens.name(0xE2) == ("bytes:\\xe2", [0xE2])
    assert tokens.name(299) == ("<id 299>", None)
    new = Sampled("x", (0xE2, 65), (-1.0, -2.0), ({0xE2: -1.0}, {66: float("-inf")}), "length")
    for chat in (True, False):
        form = Form(chat, "m", tokens, [(1,)], 1, logprobs=True, return_token_ids=True)
        assert "-9999.0" in json.dumps(form.whole([new], 3), allow_nan=False)
    second = form.chunk(0, new, 3, first=False)
    assert second["choices"][0]["logprobs"]["text_offset"] == [11, 21]


def test_harmful_fields_are_named_and_new_ones_ignored() -> None:
    """Official clients send fields that are new every month; a few others would change what is sampled."""
    base: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    record = ChatRequest.model_validate(base | {"from_the_future": {"a": 1}, "n": None, "logit_bias": None})
    assert record.messages[0].for_template() == {"role": "user", "content": "a"}
    with pytest.raises(ValidationError, match="lora_path\n  not supported: the engine loads nothing"):
        ChatRequest.model_validate(base | {"lora_path": "x"})
    with pytest.raises(ValueError, match="must not set tokenize"):
        ChatRequest.model_validate(base | {"chat_template_kwargs": {"tokenize": True}}).template_options()
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]}
    [message] = ChatRequest.model_validate({"messages": [call]}).messages
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    sampling = CompletionRequest.model_validate({"prompt": "a", "temperature": 0, "stop": "x"}).sampling(5, 0)
    assert (sampling.temperature, sampling.top_k, sampling.stop) == (0.0, -1, ("x",))


# ---- keys and options ----


def test_keys_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that others can read, or guess, is none."""
    path = tmp_path / "key"
    made = keys.make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.from_user(path) == made
    assert keys.from_user(tmp_path / "another") is None
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        keys.from_user(path)
    monkeypatch.setenv(keys.VARIABLE, "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        keys.from_user(None)
    assert keys.from_user(tmp_path / "another") is None, "a file that is named is read or written, whatever is set"


def test_a_key_file_is_removed_by_who_wrote_it_last(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first, second = keys.make(path), keys.make(path)
    keys.remove(path, first)
    assert path.exists()
    keys.remove(path, second)
    keys.remove(path, second)
    assert not path.exists()


def test_limits_make_sense(tmp_path: Path) -> None:
    """A request that could never start would wait for ever."""
    with pytest.raises(ConfigError, match="could never start"):
        Limits(concurrency=4)
    assert command._is_loopback("127.0.0.7")
    assert command._is_loopback("::1")
    assert not command._is_loopback("0.0.0.0")
    assert not command._is_loopback("localhost.example.org")


# ---- the engine that is served ----


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    """The resolver takes it modulo 65536: 70000 served on 4464, 65536 on any free one."""
    with pytest.raises(ConfigError, match=f"--port={port} is no port"):
        http.listen("127.0.0.1", port).close()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--sglang-json-model-override-args", '{"rope_theta": 1}'], {"json_model_override_args": '{"rope_theta": 1}'}),
        (["--sglang-revision", "1"], {"revision": "1"}),
        (["--sglang-disable-radix-cache"], {"disable_radix_cache": True}),
        (["--sglang-disable-radix-cache", "False"], {"disable_radix_cache": False}),
        (["--sglang-schedule-conservativeness", ".5"], {"schedule_conservativeness": 0.5}),
        (["--sglang-cuda-graph-bs-decode", "1", "2"], {"cuda_graph_bs_decode": [1, 2]}),
    ],
)
def test_options_of_sglang_are_read_as_a_run_reads_them(words: list[str], value: dict[str, Any]) -> None:
    """JSON that SGLang wants as text became a dictionary, on which it failed, and False a text, which is true."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    found = command._engine_options(parser.parse_args(["--model", str(EXAMPLE), *words])).extra
    assert found == value
    overrides = [f"sglang.{name}={words[1] if len(words) == 2 else one}" for name, one in value.items()]
    assert load_config(None, ["model.hf_path=m", "data.train=d", *overrides]).sglang == value


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tp", "2", "--kind", "fake"], "--tp, --kind would be for"),
        (["--sglang-mem-fraction-static", "0.5"], "--sglang-mem-fraction-static would be for"),
    ],
)
def test_options_of_an_own_engine_are_refused_beside_a_run(tmp_path: Path, words: list[str], named: str) -> None:
    """They were taken and had no effect: the engine is the run's."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match=named):
        command.run(parser.parse_args(["--run", str(tmp_path / "absent"), *words]))
    with pytest.raises(ConfigError, match="is no folder"):
        command.run(parser.parse_args(["--run", str(tmp_path / "absent")]))


@pytest.mark.parametrize("wrong", ["tokenizer.json", "generation_config.json"])
def test_a_folder_that_cannot_be_served_is_named(tmp_path: Path, wrong: str) -> None:
    """A tokenizer's Rust side raises plain Exception."""
    shutil.copytree(EXAMPLE, tmp_path / "model")
    content = json.loads((EXAMPLE / "tokenizer.json").read_text())
    content["model"]["type"] = "Unheard"
    (tmp_path / "model" / wrong).write_text(json.dumps(content if wrong == "tokenizer.json" else []))
    with pytest.raises(DataError, match=r"/model cannot be served: .*; expected a Hugging Face folder"):
        Tokens.load(tmp_path / "model")


def test_an_unusable_engine_does_not_end_the_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that wait for an engine must still learn that it is gone."""
    owner = Owner()
    owner.options = EngineOptions(str(EXAMPLE), kind="fake")
    owner.server.port = "port"  # no URL, which httpx refuses by an error of no family
    owner.stale = ""

    async def run() -> None:
        endpoint = Endpoint(tmp_path / NAME, "k" * 20, Limits(hold_s=0.1))
        async with endpoint.life(FastAPI()):
            owner.announce(tmp_path / NAME)
            async with asyncio.timeout(20):
                while not caplog.records:
                    await asyncio.sleep(0.05)
            owner._withdraw()
            async with endpoint.deadlines.bound():
                await asyncio.sleep(30)

    with pytest.raises(Refusal, match="no engine is announced"):
        asyncio.run(run())
    assert [record.message for record in caplog.records if "cannot look at its engine" in record.message]
