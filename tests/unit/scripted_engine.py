"""An `AsyncEngine` that draws from seed and position alone, a clock that jumps, and environments that say what they
are told: what the tests of agents share."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from megatron_sglang.agents import create_rollout
from megatron_sglang.agents.environment import Environments, Limits, Services, Step
from megatron_sglang.agents.rollout import AgentRollout
from megatron_sglang.config import RolloutConfig
from megatron_sglang.engine.fake_model import routed_experts
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.rollout import Rollout
from megatron_sglang.routing import of_engine
from megatron_sglang.types import Completion, GenerateRequest, Prompt, SamplingParams, Score

STOP = 0
TOKEN_S = 0.01


class ScriptedEngine:
    """Ids 1..9, and the stop token with probability 1/6; a token takes `TOKEN_S`, more where `slow` says so."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.asked: list[tuple[GenerateRequest, Completion]] = []
        self.slow: Callable[[GenerateRequest], float] = lambda request: 1.0
        self.spoil: Callable[[Completion], Completion] = lambda completion: completion
        self.aborts = 0
        self.experts_of: str | None = None
        """Folder of the model whose experts it tells, as the fake engine does."""
        self._aborted: dict[asyncio.AbstractEventLoop, asyncio.Event] = {}

    def whole(self, request: GenerateRequest) -> Completion:
        draw = random.Random(f"{request.sampling.seed} {request.token_ids_T}")
        ids = []
        while len(ids) < request.sampling.max_new_tokens and STOP not in ids:
            ids.append(STOP if draw.random() < 1 / 6 else draw.randint(1, 9))
        logprobs = tuple(
            -random.Random(f"{request.token_ids_T} {ids[: place + 1]}").random() for place in range(len(ids))
        )
        return Completion(tuple(ids), logprobs, "stop" if ids[-1] == STOP else "length", self.version)

    async def generate(self, request: GenerateRequest) -> Completion:
        loop, done = asyncio.get_running_loop(), self.spoil(self.whole(request))
        pace, began = TOKEN_S * self.slow(request), loop.time()
        try:
            await asyncio.wait_for(self._event().wait(), pace * len(done.token_ids_T))
        except TimeoutError:
            pass
        else:
            count = min(int((loop.time() - began) / pace), len(done.token_ids_T) - 1)
            done = Completion(done.token_ids_T[:count], done.logprobs_T[:count], "abort", self.version)
        if self.experts_of and request.routing_from is not None and done.token_ids_T:
            ids = request.token_ids_T + done.token_ids_T
            told = routed_experts(self.experts_of, ids, request.routing_from)
            done = replace(done, routed_experts=of_engine(told, len(ids) - 1 - request.routing_from))
        self.asked.append((request, done))
        return done

    async def abort(self) -> None:
        self.aborts += 1
        self._event().set()
        await asyncio.sleep(0)
        self._event().clear()

    def _event(self) -> asyncio.Event:
        return self._aborted.setdefault(asyncio.get_running_loop(), asyncio.Event())


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when everything waits for it, and then at once. For code without threads."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        assert found or timeout is not None, "everything waits, and for nothing"
        if not found:
            self._loop.now += timeout or 0.0
        return found


class Talk:
    """Says tokens 11..19, as many as the turn's first token; done where the turn is `ends` tokens long.
    Reward: the share of odd tokens in the turn."""

    def __init__(self, services: Services, *, ends: int = 4, first: int = 0) -> None:
        self.ends, self.first = ends, first

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        return (20,) * self.first

    async def step(self, turn: Completion) -> Step:
        ids = turn.token_ids_T
        share = sum(token % 2 for token in ids) / len(ids)
        said = tuple(11 + (ids[0] + place) % 9 for place in range(ids[0]))
        return Step(said, share, len(ids) == self.ends, share == 1.0, f"{len(ids)}", {"steps": 1})

    async def close(self) -> None: ...


def decode(ids: Any) -> str:
    return " ".join(map(str, ids))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{number}", (100 + number, 7), "test", {"family": "x"}) for number in range(count)]


def source(count: int = 40, batch: int = 4) -> PromptSource:
    return PromptSource(prompts(count), batch, shuffle=False)


def make_rollout(engine: ScriptedEngine, *, limits: Limits | None = None, **changes: Any) -> AgentRollout:
    """Four turns of at most eight tokens, 40 in all, groups of three."""
    arguments = changes.pop("arguments", {})
    kind = changes.pop("kind", Talk)
    limits = limits or Limits(max_turns=4, max_turn_tokens=8, max_observation_tokens=6)
    rollout = AgentRollout(
        connect=lambda: nullcontext(engine),
        reward=None,  # type: ignore[arg-type]  # Talk asks no verifier
        environments=Environments("talk", limits, lambda services: kind(services, **arguments)),
        decode=decode,
        encode=lambda text: tuple(map(ord, text)),
        sampling=SamplingParams(max_new_tokens=40, stop_token_ids=(STOP,)),
        group_size=3,
        seed=1,
        loop_factory=VirtualLoop,
    )
    for name, value in changes.items():
        setattr(rollout, name, value)
    return rollout


def limited(rollout: AgentRollout, tokens: int) -> AgentRollout:
    """With so many tokens a trajectory."""
    rollout.sampling = replace(rollout.sampling, max_new_tokens=tokens)
    return rollout


class Digits:
    """Share of odd tokens; notes how it was called."""

    tier = "none"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        self.calls.append(len(pairs))
        share = [sum(int(word) % 2 for word in one.text.split()) / len(one.token_ids_T) for _, one in pairs]
        return [Score(value, value == 1.0, "odd") for value in share]

    def close(self) -> None: ...


class Both(ScriptedEngine):
    """An engine for `Rollout` too."""

    def generate_all(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return [self.whole(request) for request in requests]


def rollouts(engine: Both, **changes: Any) -> Rollout | AgentRollout:
    tokenizer = SimpleNamespace(decode=decode, encode=lambda text, **_: [ord(one) for one in text])
    sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(STOP,))
    door: Any = SimpleNamespace(generate=engine.generate_all, client=lambda: nullcontext(engine))
    return create_rollout(
        RolloutConfig(samples_per_prompt=3, **changes),
        engine=door,
        reward=Digits(),
        tokenizer=tokenizer,
        sampling=sampling,
        seed=5,
        say=print,
    )
