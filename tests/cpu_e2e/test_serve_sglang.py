"""The endpoint before the session's real SGLang, asked by the official client and by curl; and while weights change."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_tools import Publisher, Weights
from serve_fuzz import Fuzz
from serve_tools import KEY, Served, serving, wait_until, with_template

from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import EngineError
from megatron_sglang.types import GenerateRequest, SamplingParams

MESSAGES: Any = [{"role": "system", "content": "Fill in."}, {"role": "user", "content": "def f(a):"}]
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TOKENS = 16
UPDATES = int(os.environ.get("MEGATRON_SGLANG_TEST_UPDATES", "6"))
EXAMPLES = int(os.environ.get("MEGATRON_SGLANG_TEST_EXAMPLES", "4"))
"""Weight updates of one test, requests of each kind and route of another; more by hand."""


@pytest.fixture(scope="module")
def served(
    engine: HttpEngine, tiny_model: Path, publish: Publisher, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder, original = tmp_path_factory.mktemp("run"), engine.options
    model = with_template(tiny_model, tmp_path_factory.mktemp("model") / "tiny")
    publish(weights)
    engine.options = dataclasses.replace(original, model_path=str(model))
    engine.announce(folder / NAME)
    engine.options = original
    with serving(folder) as running:
        yield running
    engine.reset_prefix_cache()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def direct(engine: HttpEngine, ids: list[int], **sampling: Any) -> Any:
    [found] = engine.generate([GenerateRequest(tuple(ids), SamplingParams(**sampling))])
    return found


def test_completions_by_the_official_client(client: openai.OpenAI, engine: HttpEngine) -> None:
    """Each figure of an answer is what the engine says for these ids and this seed."""
    found = client.completions.create(
        model="tiny",
        prompt=["def f(a):\n    return ", "def g(b):"],
        n=2,
        max_tokens=TOKENS,
        seed=7,
        temperature=0.9,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    first, *_, last = found.choices
    extra: Any = first.model_extra
    expected = direct(engine, extra["prompt_token_ids"], max_new_tokens=TOKENS, seed=7, temperature=0.9)
    assert tuple(extra["token_ids"]) == expected.token_ids_T
    assert set(extra["weight_versions"]) == {engine.version}
    assert first.logprobs is not None
    assert first.logprobs.token_logprobs == pytest.approx(list(expected.logprobs_T), abs=1e-4)
    assert first.logprobs.tokens is not None
    shown = "".join(one for one in first.logprobs.tokens if not one.startswith("<|"))
    assert shown == first.text
    assert first.finish_reason == expected.finish_reason
    assert found.usage is not None
    sampled = sum(len(choice.model_extra["token_ids"]) for choice in found.choices)  # pyright: ignore
    prompts = len(extra["prompt_token_ids"]) + len(last.model_extra["prompt_token_ids"])  # pyright: ignore
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompts, sampled)


def test_chat_by_the_official_client(client: openai.OpenAI) -> None:
    """Streamed or not, the same; tools and messages as the template writes them."""
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_completion_tokens": TOKENS}
    extra = {"extra_body": {"return_token_ids": True, "session_id": "one"}}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, tools=TOOLS, **extra)
    [choice] = whole.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert whole.usage is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    ids = choice.model_extra["prompt_token_ids"]  # pyright: ignore
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained("examples/tiny_fim/model").decode(ids)
    assert written.endswith("system: Fill in.\nuser: def f(a):\nassistant:")
    assert json.loads(written.split("<|fim_prefix|>")[1].splitlines()[0]) == TOOLS[0]
    stream = client.chat.completions.create(
        **asked, tools=TOOLS, stream=True, stream_options={"include_usage": True}, **extra
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    ids = [token for chunk in chunks for token in chunk.choices[0].model_extra["token_ids"]]  # pyright: ignore
    assert ids == choice.model_extra["token_ids"]  # pyright: ignore
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert last.usage == whole.usage


def test_stops_are_not_shown(client: openai.OpenAI) -> None:
    """A stop text that lies across tokens ends the answer before it, streamed or not."""
    free = client.completions.create(model="tiny", prompt="def f(a):", max_tokens=40, temperature=0, extra_body=NO_STOP)
    text = free.choices[0].text
    stop = text[5:8]
    for found in (
        client.completions.create(model="tiny", prompt="def f(a):", max_tokens=40, temperature=0, stop=stop).choices[0],
        _joined(client, prompt="def f(a):", max_tokens=40, temperature=0, stop=[stop, "never"]),
    ):
        assert (found.text, found.finish_reason) == (text[: text.index(stop)], "stop")


NO_STOP = {"min_tokens": 40}


def _joined(client: openai.OpenAI, **asked: Any) -> Any:
    chunks = list(client.completions.create(model="tiny", stream=True, **asked))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    return chunks[-1].choices[0].model_copy(update={"text": text})


def test_errors_are_those_of_the_official_client(client: openai.OpenAI, served: Served, engine: HttpEngine) -> None:
    """Programs that handle OpenAI's errors must not need another way for ours."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[1] * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]
    # The longest that fits is taken: SGLang keeps some tokens free, and refuses others than the endpoint must.
    for length in (248, 249, 250, 254, 255):
        with contextlib.suppress(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=[40] * length, max_tokens=256 - length)
    assert not engine.stale


def test_many_at_once_by_the_async_client(served: Served, engine: HttpEngine) -> None:
    """Each gets its own answer."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            extra = {"return_token_ids": True}
            asked = {"model": "tiny", "max_tokens": 8, "extra_body": extra}
            return await asyncio.gather(
                *(client.completions.create(prompt=[40 + n % 9], seed=n, **asked) for n in range(64))  # pyright: ignore
            )

    found = asyncio.run(ask())
    requests = [GenerateRequest((40 + n % 9,), SamplingParams(max_new_tokens=8, seed=n)) for n in range(64)]
    expected = [completion.token_ids_T for completion in engine.generate(requests)]
    assert [tuple(one.choices[0].model_extra["token_ids"]) for one in found] == expected


def test_curl_reads_a_stream(served: Served) -> None:
    """The least of clients."""
    body = json.dumps({"prompt": "def f(a):", "max_tokens": 4, "stream": True, "seed": 1})
    command = ["curl", "-sSN", "-D", "-", "-H", f"Authorization: Bearer {KEY}", "-d", body]
    command.append(f"{served.url}/v1/completions")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "HTTP/1.1 200 OK" in shown
    assert "x-weight-version: " in shown
    assert shown.endswith("data: [DONE]\n\n")


def test_who_leaves_frees_the_engine(client: openai.OpenAI, served: Served, engine: HttpEngine) -> None:
    """SGLang would sample on for nobody."""
    for stream in (True, False):
        asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "n": 8, "extra_body": {"min_tokens": 240}}
        if stream:
            with client.completions.create(**asked, max_tokens=240, stream=True) as pieces:
                next(iter(pieces))
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**asked, max_tokens=240, timeout=0.5)
        wait_until(lambda: served.endpoint.gate.taken == 0, 10)
        engine.reset_prefix_cache(10)


def test_fuzzing_leaves_sglang_as_it_was(client: openai.OpenAI, served: Served, engine: HttpEngine) -> None:
    """What the endpoint lets through must not be what SGLang dies of."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "def f(a):", "max_tokens": 8, "seed": 1}
    before = client.completions.create(**asked).choices
    found = Fuzz(served, EXAMPLES).run()
    print(json.dumps(dict(sorted(found.items()))))
    assert any(kind.endswith("completions 200") for kind in found)
    wait_until(lambda: served.endpoint.gate.taken == 0, 10)
    engine.reset_prefix_cache(10)
    assert client.completions.create(**asked).choices == before


# ---- while weights change ----


class Seesaw:
    """Two models that take turns in one engine, and what each of them says, greedily, to six prompts."""

    def __init__(self, engine: HttpEngine, publish: Publisher, weights: Weights, other_weights: Weights) -> None:
        self.engine, self.publish = engine, publish
        drawn = random.Random(0)
        prompts = [[drawn.randrange(5, 512) for _ in range(6)] for _ in range(64)]
        sampling = SamplingParams(temperature=0.0, max_new_tokens=24)
        requests = [GenerateRequest(tuple(ids), sampling) for ids in prompts]
        self.models = [weights, other_weights]
        self.known: dict[int, list[tuple[int, ...]]] = {}
        for _ in self.models:
            version = self.turn()
            self.known[version % 2] = [one.token_ids_T for one in engine.generate(requests)]
        differ = [n for n in range(64) if self.known[0][n] != self.known[1][n]]
        differ.sort(key=lambda n: -min(len(self.known[0][n]), len(self.known[1][n])))
        assert len(differ) >= 6, "the two models must differ"
        self.requests = [requests[n] for n in differ[:6]]
        self.known = {parity: [said[n] for n in differ[:6]] for parity, said in self.known.items()}
        self.counts: Counter[str] = Counter()
        self.over = threading.Event()

    def turn(self) -> int:
        version = self.publish.next_version
        self.publish(self.models[version % 2])
        return version

    def check(self, kind: str, number: int, version: int, ids: Sequence[int]) -> None:
        assert tuple(ids) == self.known[version % 2][number], f"{kind}, prompt {number}: not an answer of {version}"
        self.counts[f"{kind} {version % 2}"] += 1

    @property
    def complete(self) -> int:
        """Answers that were checked."""
        return sum(count for kind, count in self.counts.items() if " " in kind)

    def ask_the_endpoint(self, served: Served, number: int) -> None:
        stream = number % 2 == 1
        request = self.requests[number]
        body = {"prompt": request.token_ids_T, "temperature": 0, "max_tokens": 24, "return_token_ids": True}
        with served.client() as http:
            while not self.over.is_set():
                reply = http.post("/v1/completions", json=body | {"stream": stream})
                if reply.status_code == 503:
                    self.counts["503"] += 1
                    time.sleep(0.02)
                elif stream:
                    self.check_stream(number, reply)
                else:
                    found = reply.json()
                    self.check("whole", number, found["weight_version"], found["choices"][0]["token_ids"])

    def check_stream(self, number: int, reply: httpx.Response) -> None:
        if "[DONE]" not in reply.text:
            assert "engine_unavailable" in reply.text
            self.counts["broken"] += 1
            return
        lines = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        [version] = {line["weight_version"] for line in lines} | {int(reply.headers["x-weight-version"])}
        self.check("stream", number, version, [token for line in lines for token in line["choices"][0]["token_ids"]])

    async def ask_the_engine(self) -> None:
        """Without the endpoint's gate: some of these wait in SGLang while it is paused."""
        async with EngineClient(self.engine.addresses) as client:
            while not self.over.is_set():
                found = await asyncio.gather(*map(client.generate, self.requests), return_exceptions=True)
                for number, one in enumerate(found):
                    if isinstance(one, BaseException):
                        assert isinstance(one, EngineError), one
                        self.counts["refused"] += 1
                    elif one.finish_reason == "abort":
                        self.counts["aborted"] += 1
                    else:
                        self.check("bare", number, one.weight_version, one.token_ids_T)


def test_no_answer_mixes_two_versions(
    served: Served, engine: HttpEngine, publish: Publisher, weights: Weights, other_weights: Weights
) -> None:
    """Requests without pause, through the endpoint and around its gate, while weights change to and fro: every complete
    answer is the greedy one of the version that it names."""
    seesaw = Seesaw(engine, publish, weights, other_weights)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        work = [pool.submit(seesaw.ask_the_endpoint, served, number) for number in range(6)]
        work.append(pool.submit(asyncio.run, seesaw.ask_the_engine()))
        try:
            for _ in range(UPDATES):
                seen = seesaw.complete
                wait_until(lambda seen=seen: seesaw.complete >= seen + 12, 60)
                seesaw.turn()
        finally:
            seesaw.over.set()
        for one in work:
            one.result(60)
    counts = seesaw.counts
    print(dict(counts))
    assert all(counts[f"{kind} {parity}"] for kind in ("whole", "stream", "bare") for parity in (0, 1)), counts
    assert counts["503"], "no update was seen by a client"
    assert counts["aborted"] + counts["broken"], "no update ended a request"
