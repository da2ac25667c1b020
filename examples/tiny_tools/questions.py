"""The tool task: questions about numbers too large for a tiny model's head, and a CLI that writes them as JSONL.

    prompt         47 times 38, less 9?
    turn 1         calc(47*38-9)
    observation    1777                       the environment `arithmetic` answers
    turn 2         1777

Eight families, equally frequent. The corpus that the base learns from is noisy (`conversation`): the right call and the
right reading of its result are minority habits, among a systematic bug for each family, guesses and broken calls.
Splits share the families but no pair of first two numbers.

    python examples/tiny_tools/questions.py --output-dir examples/tiny_tools
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sglang.agents.tools import ToolError, calculate, find_call

Split = Literal["train", "heldout"]
COUNTS: dict[Split, int] = {"train": 1024, "heldout": 384}
HELDOUT_SHARE = 5  # every fifth pair of numbers, by hash, is held out
MAX_TURNS = 3

FAMILIES = {  # family -> how it is asked, the right expression, the systematic bug
    "add": ("{a} plus {b}", "{a}+{b}", "{a}-{b}"),
    "sub": ("{a} minus {b}", "{a}-{b}", "{b}-{a}"),
    "mul": ("{a} times {b}", "{a}*{b}", "{a}+{b}"),
    "div": ("{a} divided by {b}", "{a}//{b}", "{a}%{b}"),
    "mod": ("{a} modulo {b}", "{a}%{b}", "{a}//{b}"),
    "muladd": ("{a} times {b}, plus {c}", "{a}*{b}+{c}", "{a}*{b}-{c}"),
    "mulsub": ("{a} times {b}, less {c}", "{a}*{b}-{c}", "{a}*{b}+{c}"),
    "addmul": ("sum of {a} and {b}, times {c}", "({a}+{b})*{c}", "{a}+{b}*{c}"),
}

FIRST = {"right": 0.25, "bug": 0.35, "guess": 0.25, "broken": 0.15}
"""Shares of what the corpus does in a turn that has no result to read."""
READING = {"copy": 0.5, "short": 0.3, "operand": 0.2}
"""Shares of what it answers to a result: the result, the result without its last digit, the question's first number."""


@dataclass(frozen=True, slots=True)
class Question:
    family: str
    numbers: tuple[int, int, int]

    def _fill(self, template: str) -> str:
        return template.format(**dict(zip("abc", self.numbers, strict=True)))

    @property
    def text(self) -> str:
        return self._fill(FAMILIES[self.family][0]) + "?\n"

    @property
    def expression(self) -> str:
        return self._fill(FAMILIES[self.family][1])

    @property
    def bug(self) -> str:
        return self._fill(FAMILIES[self.family][2])

    @property
    def answer(self) -> str:
        return calculate(self.expression)


def draw(split: Split, rng: random.Random, family: str) -> Question:
    """One question; numbers of two or three digits, so that the systematic bug is always wrong."""
    while True:
        numbers = (rng.randint(100, 999) if rng.random() < 0.3 else rng.randint(11, 99), rng.randint(11, 99))
        digest = hashlib.md5(repr(numbers).encode(), usedforsecurity=False).hexdigest()
        question = Question(family, (*numbers, rng.randint(2, 99)))
        if (int(digest[:8], 16) % HELDOUT_SHARE == 0) != (split == "heldout"):
            continue
        if calculate(question.bug) != question.answer:
            return question


def conversation(question: Question, rng: random.Random) -> list[tuple[bool, str]]:
    """A noisy one: (whether the model says it, text), in turns; the last one is the model's."""
    said: list[tuple[bool, str]] = []
    result = ""
    for turn in range(MAX_TURNS):
        if result:
            habit = _pick(READING, rng)
            text = {"copy": result, "short": result[:-1] or "0", "operand": str(question.numbers[0])}[habit]
            return [*said, (True, text)]
        habit = _pick(FIRST, rng) if turn < MAX_TURNS - 1 else "guess"
        if habit == "guess":
            length = len(question.answer)
            return [*said, (True, str(rng.randint(10 ** (length - 1), 10**length - 1)))]
        text = f"calc({question.bug if habit == 'bug' else question.expression})"
        text = text[:-1] if habit == "broken" else text
        said.append((True, text))
        try:
            call = find_call(text)
            assert call is not None
            result = calculate(call.argument)
            said.append((False, result + "\n"))
        except ToolError as error:
            said.append((False, f"error: {error}\n"))
    raise AssertionError("the last turn of a conversation is an answer")


def corpus(seed: int) -> Iterator[tuple[Question, list[tuple[bool, str]]]]:
    """Endless training questions with noisy conversations, families in turn."""
    rng = random.Random(seed)
    while True:
        for family in FAMILIES:
            question = draw("train", rng, family)
            yield question, conversation(question, rng)


def records(split: Split, count: int, seed: int) -> list[dict]:
    """`count` different problems; every run of eight holds each family once."""
    rng, seen, made = random.Random(f"{split}/{seed}"), set[Question](), []
    while len(made) < count:
        for family in rng.sample(list(FAMILIES), len(FAMILIES)):
            while (question := draw(split, rng, family)) in seen:
                pass
            seen.add(question)
            made.append(
                {
                    "id": f"{split}/{len(made):04d}/{family}",
                    "data_source": "arithmetic",
                    "prompt": question.text,
                    "label": question.answer,
                    "metadata": {"family": family},
                }
            )
    return made[:count]


def _pick(shares: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and heldout.jsonl of the tool task.")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        lines = (json.dumps(record) + "\n" for record in records(split, count, args.seed))
        (args.output_dir / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
