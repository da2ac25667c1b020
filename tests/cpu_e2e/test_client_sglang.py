"""The asynchronous client against a real SGLang: exact stops, min_new_tokens, aborts, many streams at once."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_tools import Publisher, Weights, until_decoding
from tokenizers import Tokenizer

from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.skyrl import SGLangInferenceEngine
from megatron_sglang.errors import EngineError, EngineStaleError
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]
TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def serving(engine: HttpEngine, publish: Publisher, weights: Weights) -> HttpEngine:
    publish(weights)
    return engine


def request(seed: int = 0, **sampling: object) -> GenerateRequest:
    """Hot, so that texts are varied and long: the example's model would end at once."""
    known = {"temperature": 1.5, "max_new_tokens": 48, "seed": seed}
    return GenerateRequest((271, 225, 74, 12, 69, 13, 30, 263), SamplingParams(**(known | sampling)))  # pyright: ignore[reportArgumentType]


def ask[T](
    engine: HttpEngine, tokenizer: Tokenizer | None, work: Callable[[EngineClient], Awaitable[T]], **more: object
) -> T:
    async def main() -> T:
        async with engine.client(tokenizer.decode if tokenizer else None, **more) as client:
            return await work(client)

    return asyncio.run(main())


def complete(engine: HttpEngine, tokenizer: Tokenizer, *requests: GenerateRequest) -> list[Completion]:
    return ask(engine, tokenizer, lambda client: asyncio.gather(*map(client.generate, requests)))


def long_ones(engine: HttpEngine, tokenizer: Tokenizer) -> list[Completion]:
    """Completions of 24 tokens and more, by seed."""
    found = complete(engine, tokenizer, *(request(seed) for seed in range(40)))
    return [completion for completion in found if len(completion.token_ids_T) >= 24]


def assert_close(one: tuple[float, ...], other: tuple[float, ...]) -> None:
    assert one == pytest.approx(other, abs=2e-5)


def test_stop_text_ends_a_completion_at_its_last_token(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """Ids or logprobs cut elsewhere than the text train on tokens that were not the answer, or lose some that were."""
    free = complete(serving, tokenizer, *(request(seed) for seed in range(40)))
    asked, expected = [], []
    for seed, completion in enumerate(free):
        ids = completion.token_ids_T
        text = tokenizer.decode(ids)
        for count in range(2, len(ids)):
            stop = tokenizer.decode(ids[count - 2 : count])
            if len(stop) > 2 and "\ufffd" not in stop and text.count(stop) == 1:
                asked.append(request(seed, stop=(stop, "never said")))
                expected.append((completion, stop, count))
                break
    assert len(asked) > 10
    for stopped, (completion, stop, count) in zip(complete(serving, tokenizer, *asked), expected, strict=True):
        assert stopped.token_ids_T == completion.token_ids_T[:count]
        assert_close(stopped.logprobs_T, completion.logprobs_T[:count])
        assert stopped.finish_reason == "stop"
        assert stopped.text + stop == tokenizer.decode(stopped.token_ids_T)
        assert stopped.weight_version == serving.version


def test_stopped_requests_end_in_the_engine(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """Otherwise the engine samples what nobody reads, in the place of what somebody waits for."""
    completion = long_ones(serving, tokenizer)[0]
    stop = completion.text[3:5]
    asked = [request(seed, max_new_tokens=200, stop=(stop, "e", " ")) for seed in range(100)]
    found = complete(serving, tokenizer, *asked)
    assert sum(one.finish_reason == "stop" for one in found) > 90
    serving.reset_prefix_cache(timeout_s=4.0)  # SGLang refuses while a request lives


def test_min_new_tokens(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """SGLang itself refuses it without a tokenizer. No stop before it is reached, stops afterwards, and no other token
    is drawn than by one request, where that would not have drawn a stop token."""
    free = complete(serving, tokenizer, *(request(seed, top_logprobs=512) for seed in range(20)))
    completion, seed = next((one, seed) for seed, one in enumerate(free) if len(one.token_ids_T) >= 24)
    ids = completion.token_ids_T
    early, late = ids[2], next(token for n, token in enumerate(ids) if n >= 12 and token not in ids[:n])
    at = ids.index(late)
    short, forced, same = complete(
        serving,
        tokenizer,
        request(seed, stop_token_ids=(early,)),
        request(seed, stop_token_ids=(early,), min_new_tokens=8),
        request(seed, stop_token_ids=(late,), min_new_tokens=6),
    )
    assert short.token_ids_T == ids[: ids.index(early) + 1]
    assert len(forced.token_ids_T) >= 8
    assert not {0, early} & set(forced.token_ids_T[:8])
    assert same.finish_reason == "stop"
    assert same.token_ids_T == ids[: at + 1]
    assert_close(same.logprobs_T[6:], completion.logprobs_T[6 : at + 1])
    renormalised = tuple(
        logprob - math.log1p(-sum(math.exp(row[token]) for token in (0, late)))
        for logprob, row in zip(completion.logprobs_T[:6], completion.top_logprobs_T, strict=False)
    )
    assert_close(same.logprobs_T[:6], renormalised)
    [cut] = complete(serving, tokenizer, request(seed, max_new_tokens=6, min_new_tokens=6))
    assert (len(cut.token_ids_T), cut.finish_reason) == (6, "length")


def test_min_p_with_a_seed(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """SGLang would end the engine. At 1.0 only the likeliest token is left, whatever is drawn."""
    greedy, first, again, other = complete(
        serving,
        tokenizer,
        request(temperature=0.0),
        *(request(seed, temperature=1.0, min_p=min_p) for seed, min_p in ((1, 1.0), (1, 0.05), (1, 0.05))),
    )
    assert first.token_ids_T == greedy.token_ids_T
    assert again.token_ids_T == other.token_ids_T
    assert all(logprob > math.log(0.05) for logprob in again.logprobs_T), "nothing below 0.05 of the likeliest"


def test_top_logprobs(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """What SGLang reports for each position, streamed or not, also after a stop text."""
    whole, cut = complete(serving, tokenizer, request(1, top_logprobs=5), request(1, top_logprobs=5, stop=("e",)))
    for completion in (whole, cut):
        assert len(completion.top_logprobs_T) == len(completion.token_ids_T)
        for token, logprob, top in zip(
            completion.token_ids_T, completion.logprobs_T, completion.top_logprobs_T, strict=True
        ):
            assert len(top) == 5
            assert list(top.values()) == sorted(top.values(), reverse=True)
            assert top.get(token, logprob) == pytest.approx(logprob, abs=2e-5)
            assert logprob <= max(top.values()) + 2e-5


@pytest.mark.parametrize("has_admin_key", [True, False])
def test_abort_returns_what_was_sampled(serving: HttpEngine, tokenizer: Tokenizer, has_admin_key: bool) -> None:
    """Over-sampling and partial rollouts rest on it. SGLang wants its admin key for an abort; without it streams do."""

    async def work() -> list[Completion]:
        addresses = [replace(one, **({} if has_admin_key else {"admin_key": ""})) for one in serving.addresses]
        async with EngineClient(addresses, decode=tokenizer.decode, concurrency=60) as client:
            asked = (client.generate(request(seed, max_new_tokens=230)) for seed in range(200))
            tasks = [asyncio.create_task(one) for one in asked]
            await until_decoding(serving, 20)
            await client.abort()
            assert client.running == 0
            return await asyncio.gather(*tasks)

    found = asyncio.run(work())
    aborted = [one for one in found if one.finish_reason == "abort"]
    assert len(aborted) > 20
    assert sum(bool(one.token_ids_T) for one in aborted) > 10
    assert any(not one.token_ids_T and one.weight_version == -1 for one in found[60:])
    serving.reset_prefix_cache(timeout_s=4.0)
    for seed, one in enumerate(complete(serving, tokenizer, *(request(n) for n in range(10)))):
        count = min(len(one.token_ids_T), len(found[seed].token_ids_T))
        assert found[seed].token_ids_T[:count] == one.token_ids_T[:count]


@pytest.mark.parametrize("streamed", [True, False])
def test_cancelled_callers_end_their_requests(serving: HttpEngine, tokenizer: Tokenizer, streamed: bool) -> None:
    """A caller that went away must not cost the engine a completion."""

    async def work(client: EngineClient) -> None:
        stop = ("never said",) if streamed else ()
        asked = (client.generate(request(seed, max_new_tokens=230, stop=stop)) for seed in range(100))
        tasks = [asyncio.create_task(one) for one in asked]
        await until_decoding(serving, 20)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(one, asyncio.CancelledError) for one in ended) > 50
        assert client.running == 0

    ask(serving, tokenizer, work)
    serving.reset_prefix_cache(timeout_s=4.0)


def test_many_streams_say_what_was_generated(serving: HttpEngine, tokenizer: Tokenizer) -> None:
    """256 at once: none lost, none mixed up, the pieces of each make its text."""

    async def one(client: EngineClient, seed: int) -> tuple[tuple[int, ...], str, list[int]]:
        async with contextlib.aclosing(client.stream(request(seed, max_new_tokens=12))) as stream:
            pieces = [piece async for piece in stream]
        assert [piece.finish_reason is not None for piece in pieces].index(True) == len(pieces) - 1
        ids = tuple(token for piece in pieces for token in piece.token_ids_T)
        return ids, "".join(piece.text for piece in pieces), [piece.weight_version for piece in pieces]

    async def work(client: EngineClient) -> list[tuple[tuple[int, ...], str, list[int]]]:
        return await asyncio.gather(*(one(client, seed) for seed in range(256)))

    streamed = ask(serving, tokenizer, work)
    whole = complete(serving, tokenizer, *(request(seed, max_new_tokens=12) for seed in range(256)))
    assert [ids for ids, _, _ in streamed] == [completion.token_ids_T for completion in whole]
    assert [text for _, text, _ in streamed] == [completion.text for completion in whole]
    assert {version for _, _, versions in streamed for version in versions} == {serving.version}


class Decoder:
    """What `SGLangInferenceEngine` needs of a tokenizer here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.decode

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)

    def apply_chat_template(self, conversation: object, **_: object) -> list[int]:
        raise AssertionError(conversation)


def test_skyrls_cycle(serving: HttpEngine, publish: Publisher, weights: Weights, tokenizer: Tokenizer) -> None:
    """Sleep in the middle of requests, wake up by parts in SkyRL's order, replace the weights, serve: at a wrong order
    of these SGLang ends, and it would serve what it finds in memory that was given back."""
    tensors = list(weights.values())
    update = {"names": list(weights), "tensors": tensors, "shapes": [list(tensor.shape) for tensor in tensors]}
    batch = {
        "prompt_token_ids": [list(request().token_ids_T)] * 4,
        "sampling_params": {"max_generate_length": 24, "temperature": 1.5, "seed": 5, "logprobs": 0},
    }

    async def work() -> None:
        skyrl = SGLangInferenceEngine(serving, Decoder(tokenizer))
        before = await skyrl.generate(batch)
        assert len({tuple(ids) for ids in before["response_ids"]}) == 4
        # They must not end by themselves: an end of text would come by chance.
        long = {"max_generate_length": 230, "min_tokens": 230, "temperature": 1.5}
        running = asyncio.create_task(skyrl.generate({**batch, "sampling_params": long}))
        await until_decoding(serving, 4)
        await skyrl.sleep()
        assert "abort" in (await running)["stop_reasons"]
        await skyrl.sleep(["weights"])
        await skyrl.wake_up(["weights"])
        with pytest.raises(EngineStaleError, match="it sleeps"):
            await skyrl.generate(batch)
        await skyrl.update_named_weights(update)
        await skyrl.wake_up(["kv_cache"])
        after = await skyrl.generate(batch)
        assert after["response_ids"] == before["response_ids"]
        assert after["weight_versions"] == [serving.version] * 4
        running = asyncio.create_task(skyrl.generate({**batch, "sampling_params": long}))
        await until_decoding(serving, 4)
        await skyrl.sleep(["kv_cache"], abort_first=False, drain_timeout=0.05)  # less than the requests take
        assert "abort" in (await running)["stop_reasons"]
        await skyrl.wake_up()
        await skyrl.update_named_weights(update)
        await skyrl.pause_generation("in_place")
        waiting = asyncio.create_task(skyrl.generate(batch))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await skyrl.resume_generation()
        assert (await waiting)["response_ids"] == before["response_ids"]
        await skyrl.reset_prefix_cache()
        with pytest.raises(EngineError, match="/load_lora_adapter with 400"):
            await skyrl.load_lora_adapter("mine", "/nonexistent")
        await skyrl.abort_generation()
        assert skyrl._client is not None
        await skyrl._client.aclose()

    asyncio.run(work())
