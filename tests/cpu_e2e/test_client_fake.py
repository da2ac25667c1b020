"""The asynchronous client's promises against the scriptable engine: nothing lost, everything ends, errors are named."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_tools import fake_options, script, until_running

from megatron_sglang.agents import create_rollout
from megatron_sglang.buckets import pack
from megatron_sglang.config import RolloutConfig
from megatron_sglang.engine import create_engine, create_engines
from megatron_sglang.engine.client import EngineClient, Piece
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import ConfigError, EngineDiedError, EngineError, EngineStaleError, EngineTimeoutError
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.stops import StopMatcher
from megatron_sglang.types import Completion, GenerateRequest, Prompt, SamplingParams, Score

pytestmark = pytest.mark.timeout(120)
WEIGHTS = [("a", torch.arange(12.0).view(3, 4))]


def request(seed: int = 7, **sampling: Any) -> GenerateRequest:
    return GenerateRequest((1, 2, 3), SamplingParams(**({"max_new_tokens": 8, "seed": seed} | sampling)))


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in ids)


def publish(engine: HttpEngine | EngineGroup, version: int) -> None:
    engine.begin_update(version)
    engine.load(pack(version, 0, WEIGHTS))
    engine.commit_update(version, 1)


def options(**changes: Any) -> Any:
    return fake_options(tp_size=1, request_timeout_s=60.0, **changes)


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpEngine]:
    with create_engine(options()) as running:
        yield running


@pytest.fixture
def engine(shared: HttpEngine) -> HttpEngine:
    """A serving engine without faults."""
    script(shared)
    if shared.stale:
        publish(shared, (shared.version or 0) + 1)
    return shared


def ask[T](engine: HttpEngine | EngineGroup, work: Callable[[EngineClient], Awaitable[T]], **more: Any) -> T:
    async def main() -> T:
        async with engine.client(**({"decode": decode} | more)) as client:
            return await work(client)

    return asyncio.run(main())


async def read(client: EngineClient, one: GenerateRequest) -> list[Piece]:
    async with contextlib.aclosing(client.stream(one)) as pieces:
        return [piece async for piece in pieces]


def test_all_ways_give_the_same_completion(engine: HttpEngine) -> None:
    """One request, one of a batch, a stream, a stream with a stop text that never comes: the engine's tokens."""

    async def work(client: EngineClient) -> tuple[Completion, Completion, list[Piece]]:
        plain = await client.generate(request(top_logprobs=2))
        return plain, await client.generate(request(top_logprobs=2, stop=("?",))), await read(client, request())

    plain, stopped, pieces = ask(engine, work)
    [batched] = engine.generate([request(top_logprobs=2)])
    assert plain == stopped == replace(batched, text=decode(batched.token_ids_T))
    assert tuple(token for piece in pieces for token in piece.token_ids_T) == plain.token_ids_T
    assert "".join(piece.text for piece in pieces) == plain.text
    assert [piece.finish_reason for piece in pieces][-2:] == [None, "length"]


def test_stops_by_token_and_by_text(engine: HttpEngine) -> None:
    """What ended it is said, its last token is the one that did, its text ends before."""
    free = ask(engine, lambda client: client.generate(request()))
    ids, text = free.token_ids_T, free.text
    by_id, by_text = ask(
        engine,
        lambda client: asyncio.gather(
            read(client, request(stop_token_ids=(ids[4],))), read(client, request(stop=("??", text[3:5])))
        ),
    )
    for pieces, matched in ((by_id, ids[4]), (by_text, text[3:5])):
        assert (pieces[-1].finish_reason, pieces[-1].matched) == ("stop", matched)
        assert tuple(token for piece in pieces for token in piece.token_ids_T) == ids[:5]
        assert "".join(piece.text for piece in pieces) == (text[:4] if matched == ids[4] else text[:3])


def test_a_stop_text_may_begin_before_an_abort(engine: HttpEngine) -> None:
    """A completion that is taken up again must end where it would have ended undisturbed."""
    begun = ask(engine, lambda client: client.generate(request(max_new_tokens=4)))
    known = (1, 2, 3, *begun.token_ids_T)
    rest = ask(engine, lambda client: client.generate(replace(request(), token_ids_T=known)))
    stop = begun.text[-2:] + rest.text[:2]
    again = replace(request(stop=(stop,)), token_ids_T=known)
    blind, seeing = ask(engine, lambda c: asyncio.gather(c.generate(again), c.generate(replace(again, stop_from=3))))
    assert blind.token_ids_T == rest.token_ids_T
    assert (seeing.token_ids_T, seeing.finish_reason) == (rest.token_ids_T[:2], "stop")


class Length:
    """A verifier: the reward is the text's length."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        self.texts += [completion.text for _, completion in items]
        return [Score(float(len(completion.text)), True) for _, completion in items]

    def close(self) -> None: ...


def test_a_run_with_stop_texts(engine: HttpEngine) -> None:
    """`rollout.stop`: each completion ends at the first of them, whose last token is trained on; the verifier sees what
    is before it. A batch that goes out as one request would know nothing of texts."""
    config = RolloutConfig(samples_per_prompt=4, stop=("e", "xa"))
    tokenizer: Any = SimpleNamespace(decode=lambda ids, **_: decode(ids), encode=lambda text, **_: list(map(ord, text)))
    sampling = SamplingParams(max_new_tokens=60, stop=config.stop)
    prompts = [Prompt(f"p{number}", (number, 7), "test", {}) for number in range(8)]
    more: dict[str, Any] = {"engine": engine, "tokenizer": tokenizer, "seed": 1, "say": print}
    groups = {
        stop: create_rollout(config, reward=(reward := Length()), sampling=replace(sampling, stop=stop), **more).batch(
            PromptSource(prompts, 8, shuffle=False), 0
        )
        for stop in ((), config.stop)
    }
    pairs = [
        (free, stopped)
        for free_group, group in zip(groups[()], groups[config.stop], strict=True)
        for free, stopped in zip(free_group.completions_G, group.completions_G, strict=True)
    ]
    ends = Counter()
    for free, stopped in pairs:
        matcher = StopMatcher(config.stop, decode)
        matcher.feed(free.token_ids_T)
        ends[matcher.matched] += 1
        assert stopped.token_ids_T == free.token_ids_T[: matcher.kept]
        assert stopped.logprobs_T == free.logprobs_T[: matcher.kept]
        assert stopped.finish_reason == ("length" if matcher.matched is None else "stop")
        assert stopped.text == (free.text if matcher.matched is None else matcher.text)
    assert ends["e"] > 10, ends
    assert sorted(reward.texts) == sorted(stopped.text for _, stopped in pairs)


def test_min_new_tokens_is_one_completion(engine: HttpEngine) -> None:
    """The two requests behind it must not show: tokens, logprobs and limits are those of one."""
    free = ask(engine, lambda client: client.generate(request()))
    ids = free.token_ids_T
    work = lambda client: client.generate(request(min_new_tokens=3, stop_token_ids=(ids[1], ids[5])))  # noqa: E731
    forced = ask(engine, work)
    assert forced.token_ids_T[0] == ids[0]
    assert ids[1] not in forced.token_ids_T[:3]
    late = ask(engine, lambda client: client.generate(request(min_new_tokens=3, stop_token_ids=(ids[5],))))
    assert (late.token_ids_T, late.logprobs_T, late.finish_reason) == (ids[:6], free.logprobs_T[:6], "stop")
    text = ask(engine, lambda client: client.generate(request(min_new_tokens=4, stop=(free.text[1], free.text[5]))))
    assert (
        text.token_ids_T == ids[: max(4, 1 + free.text.index(free.text[1], 4) if free.text[1] in free.text[4:] else 6)]
    )


def test_ten_thousand_at_once(engine: HttpEngine) -> None:
    """None lost, none doubled, none mixed up, however few run at a time."""

    async def work(client: EngineClient) -> list[Completion]:
        return await asyncio.gather(*(client.generate(request(seed, max_new_tokens=2)) for seed in range(10_000)))

    found = ask(engine, work, concurrency=32, decode=None)
    expected = engine.generate([request(seed, max_new_tokens=2) for seed in range(10_000)])
    assert found == expected


@pytest.mark.parametrize("has_admin_key", [True, False])
def test_abort_ends_what_runs_and_what_waits(engine: HttpEngine, has_admin_key: bool) -> None:
    """A caller must get back what was sampled, and soon, also for requests that have not begun."""
    script(engine, token_s=0.05)

    async def work(_: EngineClient) -> list[Completion]:
        addresses = [replace(one, **({} if has_admin_key else {"admin_key": ""})) for one in engine.addresses]
        async with EngineClient(addresses, concurrency=4) as client:
            tasks = [asyncio.create_task(client.generate(request(max_new_tokens=1000))) for _ in range(6)]
            await until_running(engine, token_s=0.05, count=4)
            await asyncio.sleep(1.0)
            await client.abort()
            return await asyncio.gather(*tasks)

    started = time.monotonic()
    found = ask(engine, work)
    assert time.monotonic() - started < 30  # of 50 s
    assert {one.finish_reason for one in found} == {"abort"}
    assert all(one.token_ids_T for one in found[:4])
    assert [(one.token_ids_T, one.weight_version) for one in found[4:]] == [((), -1)] * 2
    engine.reset_prefix_cache(timeout_s=5.0)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_caller_that_leaves_ends_its_request(engine: HttpEngine, streamed: bool) -> None:
    """Cancelled, timed out or out of its loop: the engine must not go on for nobody."""
    script(engine, token_s=0.05)
    long = request(max_new_tokens=1000)

    async def work(client: EngineClient) -> None:
        if streamed:
            async with contextlib.aclosing(client.stream(long)) as pieces:
                async for _ in pieces:
                    break
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate(long), 0.5)
        assert client.running == 0

    ask(engine, work)
    engine.reset_prefix_cache(timeout_s=5.0)


def test_an_update_ends_requests_and_refuses_new_ones(engine: HttpEngine) -> None:
    """Nothing is sampled by weights that nobody has proved; what was sampled before is kept."""
    script(engine, token_s=0.05)
    old = engine.version or 0

    async def work(client: EngineClient) -> list[Completion]:
        plain = asyncio.create_task(client.generate(request(max_new_tokens=1000)))
        forced = asyncio.create_task(client.generate(request(max_new_tokens=1000, min_new_tokens=900)))
        await until_running(engine, token_s=0.05, count=2)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(engine.begin_update, old + 1)
        with pytest.raises(EngineStaleError, match=f"update to version {old + 1} is under way"):
            await client.generate(request())
        return [await plain, await forced]

    for completion in ask(engine, work):
        assert completion.finish_reason == "abort"
        assert completion.token_ids_T
        assert completion.weight_version == old


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ({"do": "status", "status": 500}, EngineError, "/generate with 500"),
        ({"do": "sleep", "seconds": 8.0}, EngineTimeoutError, r"did not finish a completion within 3 s"),
    ],
)
def test_faults_become_named_errors(
    engine: HttpEngine, fault: dict[str, Any], error: type[Exception], message: str, streamed: bool
) -> None:
    """Within the deadline, and the client goes on."""
    script(engine, {"path": "/generate", **fault})

    async def work(client: EngineClient) -> Completion:
        with pytest.raises(error, match=message):
            await (read(client, request()) if streamed else client.generate(request()))
        client.timeout_s = 30.0
        return await client.generate(request())

    assert ask(engine, work, timeout_s=3.0).token_ids_T


@pytest.mark.parametrize(
    ("sampling", "more", "message"),
    [
        ({"stop": ("x",)}, {"decode": None}, "give the client `decode`"),
        ({"min_new_tokens": 9}, {}, "min_new_tokens=9 is more than max_new_tokens=8"),
        ({"min_new_tokens": 1}, {"eos_token_ids": None}, "give the client eos_token_ids"),
    ],
)
def test_what_cannot_be_done_is_refused(
    engine: HttpEngine, sampling: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    """Ignored, each would end completions elsewhere than was asked."""
    with pytest.raises(ConfigError, match=message):
        ask(engine, lambda client: client.generate(request(**sampling)), **more)
    if "stop" in sampling:
        with pytest.raises(ConfigError, match="know neither stop texts nor min_new_tokens"):
            engine.generate([request(**sampling)])


def test_a_death_is_named_and_a_restarted_engine_is_found() -> None:
    """The batch that met the death must fail with the engine's last words, the next one must not need a new client."""
    with create_engine(options()) as mortal:
        publish(mortal, 1)

        async def work(client: EngineClient) -> list[Completion]:
            script(mortal, {"path": "/generate", "do": "die", "after": 1})
            first = await client.generate(request())
            with pytest.raises(EngineDiedError, match=r"died during /generate: exit code (.|\n)*scripted death"):
                await client.generate(request())
            port = mortal.server.port
            await asyncio.to_thread(mortal.restart)
            assert mortal.server.port != port
            with pytest.raises(EngineStaleError, match="it was started again"):
                await client.generate(request())
            await asyncio.to_thread(publish, mortal, 2)
            return [first, await client.generate(request())]

        first, again = ask(mortal, work)
    assert first.token_ids_T == again.token_ids_T
    assert (first.weight_version, again.weight_version) == (1, 2)


def test_a_session_stays_with_its_engine() -> None:
    """Its prefix is in that engine's cache. What has no session goes where least runs."""
    with create_engines(options(), 2) as engines:
        assert isinstance(engines, EngineGroup)
        publish(engines, 1)
        for one in engines.engines:
            script(one, token_s=0.02)

        async def work(client: EngineClient) -> None:
            async def watched(session: str) -> str:
                task = asyncio.create_task(client.generate(replace(request(), session_id=session)))
                while not (working := [http.address.url for http in client._https.values() if http.load]):
                    await asyncio.sleep(0)
                await task
                return working[0]

            homes = {f"s{n}": await watched(f"s{n}") for n in range(24)}
            assert len(set(homes.values())) == 2
            assert {session: await watched(session) for session in homes} == homes
            news = [replace(request(), session_id=f"new{number // 2}") for number in range(12)]
            tasks = [asyncio.create_task(client.generate(one)) for one in news]
            await asyncio.sleep(0)
            assert [http.load for http in client._https.values()] == [6, 6], "sessions go where least runs"
            assert len({client._homes[one.session_id] for one in news[:4]}) == 2
            await asyncio.gather(*tasks)
            tasks = [asyncio.create_task(client.generate(request())) for _ in range(8)]
            while sum(http.load for http in client._https.values()) < len(tasks):
                await asyncio.sleep(0)
            assert [http.load for http in client._https.values()] == [4, 4]
            await asyncio.gather(*tasks)
            await asyncio.to_thread(engines.on_each, lambda one: one.sleep())
            with pytest.raises(EngineStaleError, match="it sleeps"):
                await client.generate(request())

        ask(engines, work)
