"""The tiny task: templated fill-in-the-middle problems, and a CLI that writes them as JSONL.

    def plan1(val, cost):
        # val times cost, plus 29
        return <hole>                     the canonical middle is `val * cost + 29`

Nine families, equally frequent: int, int2, bool, cond, list, str, loop, comp, filt. A `Draft` is a problem with the
wrong answers people would give, among them one systematic `bug` per operation; `with_tests` adds four unit tests of
which the bug never passes all. Splits share the operations but no problem: held-out ones have constants, pairs of
names, or (name, operation, form) triples that no training draft has.

    python examples/tiny_fim/problems.py --output-dir examples/tiny_fim
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "heldout"]
COUNTS: dict[Split, int] = {"train": 1440, "heldout": 576}
TESTS_PER_PROBLEM = 4

_words = str.split
INTS = _words("a b c x y z n m k p q u v w num val left right low high cost size rate age gain step")
LISTS = _words("xs ys items nums vals data row arr seq bag pts hits cells marks runs bits days bins logs caps")
STRS = _words("s t text word name line msg tag code path key title note term part label unit site mail city")
FUNCTIONS = _words("calc score f g run get find pick step use work show make task rule plan")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELDOUT_CONSTANTS = {3, 17, 23, 29, 38, 41, 54, 67, 72, 86, 93}
HELDOUT_SHARE = 5  # every fifth pair or triple, by hash, is held out


@dataclass(frozen=True, slots=True)
class Op:
    """How one operation is said, written right, written wrong by habit (`bug`), and written wrong otherwise.

    {0} and {1} stand for the operands, {2} for a letter.
    """

    phrase: str
    gold: str
    bug: str
    others: tuple[str, ...]

    def on(self, *operands: str) -> Op:
        """The operation with its operands filled in."""
        return self._map(lambda text: text.format(*operands), lambda text: text.format(*operands))

    def then(self, outer: Op, operand: str) -> Op:
        """`outer` applied to the result; the wrong answers stay those of the inner operation."""
        return self._map(lambda text: outer.phrase.format(text, operand), lambda code: outer.gold.format(code, operand))

    def _map(self, phrase: Callable[[str], str], code: Callable[[str], str]) -> Op:
        return Op(phrase(self.phrase), code(self.gold), code(self.bug), tuple(code(other) for other in self.others))


INT_OPS = {
    "add": Op("{0} plus {1}", "{0} + {1}", "{0} - {1}", ("{0} * {1}", "{1} - {0}", "{0}")),
    "sub": Op("{0} minus {1}", "{0} - {1}", "{1} - {0}", ("{0} + {1}", "abs({0} - {1})", "{1}")),
    "mul": Op("{0} times {1}", "{0} * {1}", "{0} + {1}", ("{0} - {1}", "{0} // {1}", "{0} * {0}")),
    "max": Op("larger of {0} and {1}", "max({0}, {1})", "min({0}, {1})", ("{0}", "{0} + {1}", "max({0}, {0})")),
    "min": Op("smaller of {0} and {1}", "min({0}, {1})", "max({0}, {1})", ("{1}", "{0} - {1}", "min({1}, {1})")),
    "dist": Op("distance from {0} to {1}", "abs({0} - {1})", "{0} - {1}", ("abs({0} + {1})", "{1} - {0}", "abs({0})")),
    "mod": Op("{0} modulo {1}", "{0} % {1}", "{0} // {1}", ("{1} % {0}", "{0} - {1}", "{0}")),
    "div": Op("{0} divided by {1}", "{0} // {1}", "{0} % {1}", ("{1} // {0}", "{0} * {1}", "{0}")),
}
OUTER_OPS = {
    "plus": Op("{0}, plus {1}", "{0} + {1}", "{0} - {1}", ()),
    "less": Op("{0}, less {1}", "{0} - {1}", "{0} + {1}", ()),
}
BOOL_OPS = {
    "gt": Op("{0} is above {1}", "{0} > {1}", "{0} < {1}", ("{0} >= {1}", "{0} == {1}")),
    "lt": Op("{0} is below {1}", "{0} < {1}", "{0} > {1}", ("{0} <= {1}", "{0} != {1}")),
    "ge": Op("{0} is at least {1}", "{0} >= {1}", "{0} > {1}", ("{0} <= {1}", "{1} >= {0} + 1")),
    "le": Op("{0} is at most {1}", "{0} <= {1}", "{0} < {1}", ("{0} >= {1}", "{0} != {1}")),
    "eq": Op("{0} equals {1}", "{0} == {1}", "{0} != {1}", ("{0} > {1}", "{0} <= {1}")),
    "ne": Op("{0} differs from {1}", "{0} != {1}", "{0} == {1}", ("{0} > {1}", "{0} < {1}")),
    "dv": Op("{0} is a multiple of {1}", "{0} % {1} == 0", "{0} % {1} != 0", ("{0} // {1} == 0", "{0} > {1}")),
}
SEQUENCE_OPS = {
    "first": Op("first of {0}", "{0}[0]", "{0}[1]", ("{0}[-1]", "{0}")),
    "last": Op("last of {0}", "{0}[-1]", "{0}[0]", ("{0}[1]", "{0}[-2]")),
    "head": Op("first {1} of {0}", "{0}[:{1}]", "{0}[{1}:]", ("{0}[{1}]", "{0}[::{1}]")),
    "tail": Op("{0} without first {1}", "{0}[{1}:]", "{0}[:{1}]", ("{0}[-{1}:]", "{0}[{1}]")),
    "rev": Op("{0} backwards", "{0}[::-1]", "{0}[:-1]", ("{0}", "{0}[-1]")),
    "len": Op("length of {0}", "len({0})", "len({0}) - 1", ("{0}[0]", "len({0}) + 1")),
}
LIST_OPS = SEQUENCE_OPS | {
    "item": Op("item {1} of {0}", "{0}[{1}]", "{0}[-{1}]", ("{0}[:{1}]", "{0}[0]")),
    "sum": Op("sum of {0}", "sum({0})", "len({0})", ("max({0})", "{0}[0]")),
    "largest": Op("largest of {0}", "max({0})", "min({0})", ("{0}[0]", "sum({0})")),
    "smallest": Op("smallest of {0}", "min({0})", "max({0})", ("{0}[-1]", "len({0})")),
    "sort": Op("{0} in order", "sorted({0})", "{0}[::-1]", ("{0}", "min({0})")),
    "count": Op("count of {1} in {0}", "{0}.count({1})", "len({0})", ("{0}[{1}]", "sum({0})")),
}
NUMBER_FROM_LIST = ("sum", "largest", "smallest", "len", "first", "last", "item")
STR_OPS = SEQUENCE_OPS | {
    "up": Op("{0} in upper case", "{0}.upper()", "{0}.lower()", ("{0}", "{0}.upper")),
    "low": Op("{0} in lower case", "{0}.lower()", "{0}.upper()", ("{0}", "{0}.strip()")),
    "rep": Op("{0} repeated {1} times", "{0} * {1}", "{0} + {1}", ("{0}[{1}]", "{0}[:{1}]")),
    "count": Op("count of '{2}' in {0}", "{0}.count('{2}')", "len({0})", ("{0}.find('{2}')", "{0}.count({0})")),
    "join": Op("{0} then '{2}'", "{0} + '{2}'", "'{2}' + {0}", ("{0}", "{0} * 2")),
    "start": Op("{0} starts with '{2}'", "{0}.startswith('{2}')", "{0}.endswith('{2}')", ("{0} == '{2}'", "{0}[0]")),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """A problem without tests. `meaning` holds the right and the wrong middles; `kinds` the parameters' types."""

    family: str
    function: str
    parameters: tuple[str, ...]
    kinds: tuple[str, ...]
    meaning: Op
    before: str
    after: str

    @property
    def key(self) -> str:
        """What makes it the same problem as another: everything but the function's name."""
        return f"{self.meaning.phrase}|{self.before}|{self.after}"

    @property
    def prefix(self) -> str:
        return f"def {self.function}({', '.join(self.parameters)}):\n    # {self.meaning.phrase}\n{self.before}"

    def noisy_middle(self, rng: random.Random, gold: float, bug: float) -> str:
        """What the noisy corpus holds: the right middle, the systematic bug, or (the rest) another wrong one."""
        draw = rng.random()
        if draw < gold:
            return self.meaning.gold
        return self.meaning.bug if draw < gold + bug else rng.choice(self.meaning.others)


@dataclass(slots=True)
class Drawer:
    """Draws drafts of one split."""

    split: Split
    rng: random.Random

    def draft(self, family: str) -> Draft:
        return FAMILIES[family](self, family)

    def belongs(self, *parts: str) -> bool:
        """Whether a pair or triple of words is in this split."""
        digest = hashlib.md5("|".join(parts).encode(), usedforsecurity=False).hexdigest()
        return (int(digest[:8], 16) % HELDOUT_SHARE == 0) == (self.split == "heldout")

    def constant(self) -> str:
        while True:
            value = self.rng.randint(2, 99)
            if (value in HELDOUT_CONSTANTS) == (self.split == "heldout"):
                return str(value)

    def name_pair(self) -> tuple[str, str]:
        while True:
            first, second = self.rng.sample(INTS, 2)
            if self.belongs(first, second):
                return first, second

    def operands(self) -> tuple[str, ...]:
        """Two names, or a name and a constant."""
        if self.rng.random() < 0.5:
            return self.name_pair()
        return self.rng.choice(INTS), self.constant()

    def pick(self, table: dict[str, Op]) -> tuple[str, Op]:
        name = self.rng.choice(list(table))
        return name, table[name]

    def return_form(self) -> tuple[str, str]:
        return ("    return ", "\n") if self.rng.random() < 0.6 else ("    r = ", "\n    return r\n")

    def finish(self, family: str, parameters: tuple[str, ...], kinds: str, meaning: Op, form: tuple[str, str]) -> Draft:
        digit = str(self.rng.randint(0, 9)) if self.rng.random() < 0.3 else ""
        function = self.rng.choice(FUNCTIONS) + digit
        return Draft(family, function, parameters, tuple(kinds.split()), meaning, *form)


def _scalar(draw: Drawer, family: str) -> Draft:
    """int, int2, bool, cond: an expression of one or two integers."""
    operands = draw.operands()
    parameters = tuple(word for word in operands if not word.isdigit())
    _, op = draw.pick(BOOL_OPS if family in ("bool", "cond") else INT_OPS)
    meaning, form = op.on(*operands), draw.return_form()
    if family == "int2":
        _, outer = draw.pick(OUTER_OPS)
        constant, inner = draw.constant(), meaning.gold
        bug = draw.rng.choice([outer.bug.format(inner, constant), outer.gold.format(meaning.bug, constant)])
        chain = meaning.then(outer, constant)
        meaning = Op(chain.phrase, chain.gold, bug, (*chain.others, inner))
    if family == "cond":
        yes, no = draw.constant(), draw.constant()
        meaning = Op(f"{yes} if {meaning.phrase} else {no}", meaning.gold, meaning.bug, meaning.others)
        form = ("    if ", f":\n        return {yes}\n    return {no}\n")
    return draw.finish(family, parameters, " ".join(["int"] * len(parameters)), meaning, form)


def _sequence(draw: Drawer, family: str) -> Draft:
    """list, str: one operation on a whole sequence; (name, operation, form) decides the split."""
    while True:
        name = draw.rng.choice(LISTS if family == "list" else STRS)
        op_name, op = draw.pick(LIST_OPS if family == "list" else STR_OPS)
        meaning = op.on(name, str(draw.rng.randint(1, 4)), draw.rng.choice(LETTERS))
        if family == "list" and op_name in NUMBER_FROM_LIST and draw.rng.random() < 0.5:
            outer_name, outer = draw.pick(OUTER_OPS)
            op_name, meaning = op_name + outer_name, meaning.then(outer, draw.constant())
        form = draw.return_form()
        if draw.belongs(name, op_name, form[0]):
            return draw.finish(family, (name,), family, meaning, form)


def _elements(draw: Drawer, family: str) -> Draft:
    """loop, comp, filt: an expression of a list's element and perhaps a second integer."""
    values, (element, other) = draw.rng.choice(LISTS), draw.name_pair()
    second = other if draw.rng.random() < 0.5 else draw.constant()
    _, op = draw.pick(BOOL_OPS if family == "filt" else INT_OPS)
    meaning = op.on(element, second)
    if family == "loop":
        phrase = f"total of {meaning.phrase} for {element} in {values}"
        form = (f"    r = 0\n    for {element} in {values}:\n        r += ", "\n    return r\n")
    elif family == "comp":
        phrase = f"list of {meaning.phrase} for {element} in {values}"
        form = ("    return [", f" for {element} in {values}]\n")
    else:
        phrase = f"each {element} in {values} where {meaning.phrase}"
        form = (f"    return [{element} for {element} in {values} if ", "]\n")
    meaning = Op(phrase, meaning.gold, meaning.bug, meaning.others)
    if second == other:
        return draw.finish(family, (values, other), "list int", meaning, form)
    return draw.finish(family, (values,), "list", meaning, form)


FAMILIES: dict[str, Callable[[Drawer, str], Draft]] = {
    **dict.fromkeys(("int", "int2", "bool", "cond"), _scalar),
    **dict.fromkeys(("list", "str"), _sequence),
    **dict.fromkeys(("loop", "comp", "filt"), _elements),
}


def _argument(rng: random.Random, kind: str, near: list[int]) -> Any:
    if kind == "int":
        close = rng.choice(near) if rng.random() < 0.7 else rng.randint(1, 20)
        return rng.choice([rng.randint(1, 99), close, rng.randint(1, 12)])
    if kind == "list":
        length = rng.randint(5, 7)
        return [rng.choice([rng.randint(1, 99), rng.randint(1, 9), rng.choice(near)]) for _ in range(length)]
    return "".join(rng.choice("aAbBcDeEfGhHiJkLmMnoPqrsTuvwxyz") for _ in range(rng.randint(5, 8)))


def _outcomes(draft: Draft, middle: str, calls: list[list[Any]]) -> list[tuple[Any, ...]]:
    """(type, value) of each call, or () where it raises. Runs only middles written in this file."""
    namespace: dict[str, Any] = {}
    exec(compile(draft.prefix + middle + draft.after, draft.function, "exec"), namespace)
    outcomes = []
    for args in calls:
        try:
            value = namespace[draft.function](*args)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            outcomes.append(())
        else:
            outcomes.append((type(value), value))
    return outcomes


def with_tests(draft: Draft, rng: random.Random) -> list[dict[str, Any]] | None:
    """Four tests that fail the bug and, where the random arguments allow, every other wrong answer.

    None if these arguments cannot tell the bug from the right answer, or give one value only.
    """
    constants = [int(number) for number in re.findall(r"(?<!\w)\d+", draft.meaning.gold)]
    near = [constant + step for constant in constants for step in (-1, 0, 1)] or [5]
    calls = [[_argument(rng, kind, near) for kind in draft.kinds] for _ in range(24)]
    if draft.kinds == ("int", "int"):
        calls.append([rng.randint(2, 30)] * 2)
    expected = _outcomes(draft, draft.meaning.gold, calls)
    usable = [index for index, outcome in enumerate(expected) if outcome]
    fails = [  # for each wrong answer, the calls that expose it; the bug comes first
        [index for index in usable if outcomes[index] != expected[index]]
        for outcomes in (_outcomes(draft, wrong, calls) for wrong in (draft.meaning.bug, *draft.meaning.others))
    ]
    if len(usable) < TESTS_PER_PROBLEM or not fails[0]:
        return None
    chosen: list[int] = []
    for exposing in fails:
        if exposing and not set(exposing) & set(chosen) and len(chosen) < TESTS_PER_PROBLEM:
            chosen.append(rng.choice(exposing))
    rng.shuffle(usable)
    for index in usable:  # new values first, so that no constant passes
        if len(chosen) < TESTS_PER_PROBLEM and expected[index] not in [expected[other] for other in chosen]:
            chosen.append(index)
    chosen += [index for index in usable if index not in chosen][: TESTS_PER_PROBLEM - len(chosen)]
    if len({repr(expected[index]) for index in chosen}) < 2:
        return None
    return [{"args": calls[index], "expect": expected[index][1]} for index in chosen]


def corpus(seed: int) -> Iterator[Draft]:
    """Endless training drafts, families in turn; what the tokenizer and the base model are trained on."""
    draw = Drawer("train", random.Random(seed))
    while True:
        for family in FAMILIES:
            yield draw.draft(family)


def make(split: Split, count: int, seed: int) -> list[tuple[Draft, dict[str, Any]]]:
    """`count` different problems with their records. Every run of nine holds each family once, in random order."""
    rng = random.Random(f"{split}/{seed}")
    draw, seen, made = Drawer(split, rng), set[str](), []
    while len(made) < count:
        for family in rng.sample(list(FAMILIES), len(FAMILIES)):
            while True:
                draft = draw.draft(family)
                tests = None if draft.key in seen else with_tests(draft, rng)
                if tests:
                    break
            seen.add(draft.key)
            made.append((draft, _record(draft, tests, f"{split}/{len(made):04d}/{family}")))
    return made[:count]


def _record(draft: Draft, tests: list[dict[str, Any]], identity: str) -> dict[str, Any]:
    return {
        "id": identity,
        "data_source": "fim_python",
        "family": draft.family,
        "prefix": draft.prefix,
        "suffix": draft.after,
        "middle": draft.meaning.gold,
        "entry_point": draft.function,
        "tests": tests,
        "pure": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and heldout.jsonl of the tiny task.")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        lines = (json.dumps(record) + "\n" for _, record in make(split, count, args.seed))
        (args.output_dir / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
