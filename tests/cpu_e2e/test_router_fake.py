"""sglang-router in front of scriptable engines: what it carries, and what a run's requests get through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
import torch
from engine_tools import fake_options, script, until_running

from megatron_sglang.buckets import pack
from megatron_sglang.engine import create_engines
from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.router import SESSION_HEADER, Router, is_installed
from megatron_sglang.errors import EngineDiedError
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not is_installed(), reason="sglang-router is optional (megatron-sglang[router])"),
]
WEIGHTS = [("a", torch.arange(12.0).view(3, 4))]
SHORT = {"temperature": 1.0, "max_new_tokens": 1, "sampling_seed": 0}
REQUESTS = [
    GenerateRequest((session, 2, 3), SamplingParams(max_new_tokens=12, seed=10 * session + turn), f"session {session}")
    for turn in range(3)
    for session in range(8)
]


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineGroup]:
    group = create_engines(fake_options(tp_size=1, update_timeout_s=40.0), 2)
    assert isinstance(group, EngineGroup)
    with group:
        yield group
        if group.router is not None:
            group.router.close()


@pytest.fixture
def engines(shared: EngineGroup) -> Iterator[EngineGroup]:
    """Both serve, without faults and without a router."""
    for engine in shared.engines:
        script(engine)
    publish(shared)
    yield shared
    if shared.router is not None:
        shared.router.close()
        shared.router = None


def publish(group: EngineGroup) -> None:
    version = max(engine.version or 0 for engine in group.engines) + 1
    group.begin_update(version)
    group.load(pack(version, 0, WEIGHTS))
    group.commit_update(version, 1)


def tell_apart(group: EngineGroup) -> None:
    """Who served is seen by the version."""
    for number, engine in enumerate(group.engines):
        engine.connected.post("/update_weight_version", {"new_version": str(number)}, 10.0)


def ask[T](engines: EngineGroup, work: Callable[[EngineClient], Awaitable[T]]) -> T:
    async def main() -> T:
        async with engines.client() as client:
            return await work(client)

    return asyncio.run(main())


async def all_of(client: EngineClient) -> list[Completion]:
    return await asyncio.gather(*map(client.generate, REQUESTS))


@pytest.mark.parametrize("policy", ["manual", "cache_aware"])
def test_a_client_gets_the_same_by_the_router(engines: EngineGroup, policy: Any) -> None:
    """Tokens, logprobs and ends are those of a client that chooses itself; by "manual" a session stays at one engine,
    and both have some."""
    direct = ask(engines, all_of)
    engines.router = Router(engines, policy=policy)
    tell_apart(engines)
    for engine in engines.engines:  # all are under way when sessions are placed, by what runs where
        script(engine, token_s=0.05)
    routed = ask(engines, all_of)
    for engine in engines.engines:
        script(engine)
    served = [one.weight_version for one in routed]
    assert [replace(one, weight_version=0) for one in routed] == [replace(one, weight_version=0) for one in direct]
    if policy == "manual":
        sessions = [{served[index] for index in range(session, len(served), 8)} for session in range(8)]
        assert all(len(engine) == 1 for engine in sessions), sessions
        assert 2 <= sum(engine == {0} for engine in sessions) <= 6, sessions
    pid = engines.router.pid
    assert ask(engines, all_of) == routed, "the next rollout batch finds the same router"
    assert engines.router.pid == pid


def test_an_abort_goes_through_the_router(engines: EngineGroup) -> None:
    """Stragglers are stopped so. The router does not know /abort_request: streams are closed, and the engines must
    notice through it, or they would go on for nobody."""
    engines.router = Router(engines)
    engines.router.ensure()
    for engine in engines.engines:
        script(engine, token_s=0.2)
    slow = [replace(one, sampling=replace(one.sampling, max_new_tokens=200)) for one in REQUESTS]

    async def work(client: EngineClient) -> list[Completion]:
        tasks = [asyncio.create_task(client.generate(one)) for one in slow]
        await asyncio.sleep(2.5)
        await client.abort()
        return await asyncio.gather(*tasks)

    began = time.monotonic()
    completions = ask(engines, work)
    assert time.monotonic() - began < 10
    assert {one.finish_reason for one in completions} == {"abort"}
    assert any(one.token_ids_T for one in completions), "what was there is kept"
    for engine in engines.engines:
        engine.reset_prefix_cache(timeout_s=10.0)  # an error while they still work on them


@pytest.mark.parametrize("victim", ["engine", "router"])
def test_what_dies_is_named_and_comes_back(engines: EngineGroup, victim: str) -> None:
    """The router answers 5xx for an engine that is gone; a run that does not see who died ends instead of starting it
    again. A new engine has another port."""
    engines.router = Router(engines)
    before = ask(engines, all_of)
    supervisor = engines.router.pid if victim == "router" else engines.engines[1].server.pid
    assert supervisor is not None
    for engine in engines.engines:
        script(engine, token_s=0.1)

    async def work(client: EngineClient) -> list[Completion]:
        asking = asyncio.create_task(all_of(client))
        await asyncio.sleep(0.4)
        psutil.Process(supervisor).children()[0].kill()
        return await asking

    with pytest.raises(EngineDiedError, match=r"router: exit code" if victim == "router" else r"engine 1: exit code"):
        ask(engines, work)
    assert engines.why_dead()
    engines.restart()
    assert engines.why_dead() is None
    for engine in engines.engines:
        script(engine)
    publish(engines)
    again = ask(engines, all_of)
    assert [one.token_ids_T for one in again] == [one.token_ids_T for one in before]


def test_a_router_passes_on_what_it_can_and_dies_with_the_trainer(engines: EngineGroup) -> None:
    """Why it is optional: what it does not carry is asserted too, so that a version that does is noticed."""
    tell_apart(engines)
    sampling = {"temperature": 0.8, "max_new_tokens": 4, "sampling_seed": 5, "stop_token_ids": [7]}
    body = {"input_ids": [1, 2, 3], "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2}
    expected = engines.engines[0].connected.post("/generate", body, 10.0, admin=False)
    with Router(engines) as router:
        tree = [psutil.Process(router.pid), *psutil.Process(router.pid).children(recursive=True)]
        assert not [one for one in tree if router.address.api_key in " ".join(one.cmdline())]
        headers = {"Authorization": f"Bearer {router.address.api_key}"}

        def refused(path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> int:
            """In a connection of its own: the router may close it, with the body unread, a moment after its answer."""
            url = f"{router.address.url}{path}"
            return httpx.post(url, json=body, headers=headers, trust_env=False, timeout=20.0).status_code

        with httpx.Client(base_url=router.address.url, trust_env=False, timeout=20.0) as client:
            answer = client.post("/generate", json=body, headers=headers).json()
            assert answer["output_ids"] == expected["output_ids"]
            for key in ("output_token_logprobs", "output_top_logprobs"):
                assert answer["meta_info"][key] == expected["meta_info"][key]
            assert refused("/generate", body) == 401
            served = {}
            for session in [f"session {number}" for number in range(24)] * 2:
                named = {**headers, SESSION_HEADER: session}
                version = client.post("/generate", json=body, headers=named).json()["meta_info"]["weight_version"]
                served.setdefault(session, set()).add(version)
            assert all(len(versions) == 1 for versions in served.values()), "a session stays where it was"
            assert set().union(*served.values()) == {"0", "1"}
            assert refused("/abort_request", {"rid": "x"}, headers) == 404
            several = {**body, "input_ids": [[1, 2], [3, 4]], "sampling_params": [sampling, sampling]}
            assert refused("/generate", several, headers) == 422
    assert not psutil.wait_procs(tree, 10)[1]


def test_the_routers_cache_aware_policy_knows_prefixes_of_token_ids(engines: EngineGroup) -> None:
    """While nothing is under way it gives every new prompt to the same engine; one that was served elsewhere, because
    that engine was busy, goes back there."""
    tell_apart(engines)

    def served(client: httpx.Client, ids: list[int]) -> str:
        answer = client.post("/generate", json={"input_ids": ids, "sampling_params": SHORT})
        return answer.json()["meta_info"]["weight_version"]

    with Router(engines, policy="cache_aware") as router, ThreadPoolExecutor(1) as pool:
        headers = {"Authorization": f"Bearer {router.address.api_key}"}
        with httpx.Client(base_url=router.address.url, trust_env=False, timeout=20.0, headers=headers) as client:
            [first] = {served(client, list(range(start, start + 20))) for start in range(100, 300, 20)}
            for engine in engines.engines:
                script(engine, token_s=3.0)
            slow = pool.submit(served, client, list(range(300, 320)))
            asyncio.run(until_running(engines.engines[int(first)], token_s=3.0))
            elsewhere = list(range(400, 440))
            assert served(client, elsewhere) != first
            assert slow.result() == first
            for engine in engines.engines:
                script(engine)
            assert served(client, [*elsewhere, 1, 2, 3]) != first
            assert served(client, list(range(320, 360))) == first
