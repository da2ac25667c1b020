"""The run's verifier for many trajectories at once: whatever waits is scored together, in a thread, one call at a time.

A verifier need not be safe for threads, and the sandbox behind it works best on several completions.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from megatron_sglang.errors import RewardError
from megatron_sglang.interfaces import Reward
from megatron_sglang.rollout import check_scores
from megatron_sglang.types import Completion, Prompt, Score


@dataclass(slots=True, eq=False)
class _Item:
    prompt: Prompt
    completion: Completion
    score: Score | None = None
    failure: Exception | None = None
    """Of the call that it was part of."""


class Scorer:
    """Scores completions that end one by one: `await scorer(prompt, completion)`. Those that come while the verifier is
    busy are given to it together, in its next call. Raises what it raises. For one event loop."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._waiting: list[_Item] = []
        self._busy = asyncio.Lock()

    async def __call__(self, prompt: Prompt, completion: Completion) -> Score:
        item = _Item(prompt, completion)
        self._waiting.append(item)
        async with self._busy:
            if item in self._waiting:  # else it went along with another's call
                items, self._waiting = self._waiting, []
                try:
                    scores = await asyncio.to_thread(
                        self._reward.score, [(one.prompt, one.completion) for one in items]
                    )
                    check_scores([one.prompt for one in items], scores)
                except Exception as error:
                    for one in items:  # whoever is heard first must be able to say why
                        one.failure = error
                    raise
                for one, score in zip(items, scores, strict=True):
                    one.score = score
        if item.score is None:
            why = item.failure or "the call that it was part of was ended"
            raise RewardError(f"completion of {prompt.id!r} was not scored: {why}") from item.failure
        return item.score
