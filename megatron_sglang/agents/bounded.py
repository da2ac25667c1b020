"""An environment of one trajectory, whose answers have a deadline.

The run's verifier is not counted: it works on a whole batch of turns at a time, so that a turn may wait long behind
others, and its jobs have deadlines of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, replace

from megatron_sglang.agents.environment import Environment, Observation, Services, Step
from megatron_sglang.errors import RewardError
from megatron_sglang.types import Completion, Prompt, Score


@dataclass(slots=True, eq=False)
class _Clock:
    """A timeout that stands still while anybody is in `stopped`."""

    scope: asyncio.Timeout
    inside: int = 0
    left_s: float = 0.0

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        if self.inside == 0 and (when := self.scope.when()) is not None and not self.scope.expired():
            self.left_s = when - loop.time()
            self.scope.reschedule(None)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if self.inside == 0 and not self.scope.expired():
                self.scope.reschedule(loop.time() + self.left_s)


class Bounded:
    """Raises `RewardError` where an answer, or its end, takes the environment itself longer than `seconds`."""

    def __init__(
        self, make: Callable[[Services], Environment], services: Services, prompt: Prompt, seconds: float
    ) -> None:
        self._services, self._prompt, self._seconds = services, prompt, seconds
        self._clock: _Clock | None = None
        self._environment = make(replace(services, score=self._score))
        self.name = type(self._environment).__name__

    def reset(self) -> Observation:
        return self._environment.reset(self._prompt)

    async def step(self, turn: Completion) -> Step:
        async with self._within(f"did not answer a turn of prompt {self._prompt.id!r}"):
            return await self._environment.step(turn)

    async def close(self) -> None:
        async with self._within(f"did not close after prompt {self._prompt.id!r}"):
            await self._environment.close()

    @contextlib.asynccontextmanager
    async def _within(self, failed: str) -> AsyncGenerator[None]:
        scope = asyncio.timeout(self._seconds)
        try:
            async with scope:
                self._clock = _Clock(scope)
                try:
                    yield
                finally:
                    self._clock = None
        except TimeoutError as error:
            if not scope.expired():  # the environment's own
                raise
            raise RewardError(
                f"environment {self.name} {failed} within {self._seconds:g} s; raise "
                "rollout.environment.step_timeout_s or correct it"
            ) from error

    async def _score(self, prompt: Prompt, completion: Completion) -> Score:
        with self._clock.stopped() if self._clock else contextlib.nullcontext():
            return await self._services.score(prompt, completion)
