"""One turn, scored by the run's verifier: what `rollout.Rollout` does, for runs that over-sample or resume."""

from __future__ import annotations

from megatron_sglang.agents.environment import Observation, Services, Step
from megatron_sglang.types import Completion, Prompt


class Single:
    """Done after the first turn."""

    def __init__(self, services: Services) -> None:
        self._score = services.score
        self._prompt: Prompt

    def reset(self, prompt: Prompt) -> Observation:
        self._prompt = prompt
        return ""

    async def step(self, turn: Completion) -> Step:
        score = await self._score(self._prompt, turn)
        return Step(reward=score.value, done=True, passed=score.passed, detail=score.detail)

    async def close(self) -> None: ...
