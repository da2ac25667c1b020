"""Fill in the middle, and try again with what the tests said.

    prompt                                   <fim prefix> ... <fim suffix> ... <fim middle>
    turn 1                                   a - b <end>
    observation: the first failed test,      # wrong value -1, expected 5
    then the prompt once more                <fim prefix> ... <fim suffix> ... <fim middle>
    turn 2                                   a + b <end>

The error is the verdict of the sandboxed run (`Score.detail`): one line, bounded, the same each time. It says what a
failing test says, which for one that compares values is the value wanted; which arguments gave it is not said.
"""

from __future__ import annotations

import re

from megatron_sglang.agents.environment import Observation, Services, Step
from megatron_sglang.errors import ConfigError
from megatron_sglang.types import Completion, Prompt

_ADDRESS = re.compile(r"0x[0-9a-f]+")


class FimRepair:
    """Ends when all tests pass, or at the loop's turn limit. Reward: the last attempt's, times `discount` for each turn
    before it.

    max_error_characters: of the error's text. restate: repeat the prompt after it, so that a model that was trained on
    single holes finds what it knows.
    """

    def __init__(
        self, services: Services, *, discount: float = 1.0, max_error_characters: int = 80, restate: bool = True
    ) -> None:
        if not 0 < discount <= 1:
            raise ConfigError(f"rollout.environment.discount={discount}; expected above 0, at most 1")
        if max_error_characters < 1:
            raise ConfigError(f"rollout.environment.max_error_characters={max_error_characters}; expected at least 1")
        self._services, self._discount = services, discount
        self._max_error_characters, self._restate = max_error_characters, restate
        self._prompt: Prompt
        self._attempts = 0

    def reset(self, prompt: Prompt) -> Observation:
        self._prompt = prompt
        return ""

    async def step(self, turn: Completion) -> Step:
        score = await self._services.score(self._prompt, turn)
        reward = score.value * self._discount**self._attempts
        counts = {"first_attempt_passed": float(score.passed and self._attempts == 0)}
        self._attempts += 1
        if score.passed:
            return Step(reward=reward, done=True, passed=True, detail=score.detail, counts=counts)
        line = error_line(score.detail, self._max_error_characters)
        observation = self._services.encode(f"# {line}\n") + (self._prompt.token_ids_T if self._restate else ())
        return Step(observation, reward, detail=score.detail, counts=counts)

    async def close(self) -> None: ...


def error_line(detail: str, limit: int) -> str:
    """One line of at most `limit` characters; addresses, which differ between runs, are left out.

    >>> error_line("TypeError: <A at 0x7f00>\\nis not a number", 80)
    'TypeError: <A at 0x> is not a number'
    """
    return _ADDRESS.sub("0x", " ".join(detail.split()) or "failed")[:limit]
