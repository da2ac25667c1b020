"""An environment as a user writes it: says how many vowels the turn had, and ends after `turns` of them."""

from __future__ import annotations

from megatron_sglang.agents.environment import Services, Step
from megatron_sglang.types import Completion, Prompt


class Count:
    def __init__(self, services: Services, *, turns: int) -> None:
        self.turns, self.vowels, self.letters = turns, 0, 0

    def reset(self, prompt: Prompt) -> str:
        return "# count\n"

    async def step(self, turn: Completion) -> Step:
        letters = [letter for letter in turn.text.lower() if letter.isalpha()]
        self.vowels += sum(letter in "aeiou" for letter in letters)
        self.letters += len(letters)
        self.turns -= 1
        return Step(f"{self.vowels}\n", self.vowels / max(self.letters, 1), self.turns == 0)

    async def close(self) -> None: ...
