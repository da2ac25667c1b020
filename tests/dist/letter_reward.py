"""A reward function as a user writes it: how many of the completion's letters are vowels."""

from __future__ import annotations

from megatron_sglang.types import Completion, Prompt


def vowels(prompt: Prompt, completion: Completion) -> float:
    letters = [letter for letter in completion.text.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(len(letters), 1)
