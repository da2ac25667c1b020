"""Fill-in-the-middle: building prompts, putting completions back, and making holes in Python functions.

A problem is a mapping with `prefix`, `suffix` and `middle` (the canonical hole). Prompts are in the order
prefix-suffix-middle (PSM): <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|>, each part encoded by itself, so
that the hole's edges are token edges. Holes are those of HumanEval-Infilling (Bavarian et al. 2022).
"""

from __future__ import annotations

import ast
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sglang.errors import DataError

SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)


@dataclass(frozen=True, slots=True)
class FimTokens:
    """A tokenizer's three FIM tokens, and the tokenizer."""

    tokenizer: Any
    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Any) -> FimTokens:
        """Find the FIM tokens of a Hugging Face tokenizer; `DataError` if it has no complete set."""
        vocabulary = tokenizer.get_vocab()
        for names in SPELLINGS:
            if all(name in vocabulary for name in names):
                return cls(tokenizer, *(vocabulary[name] for name in names))
        missing = min(([name for name in names if name not in vocabulary] for names in SPELLINGS), key=len)
        raise DataError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} lacks the FIM token(s) {', '.join(missing)}; "
            f"expected the special tokens of one of: {'; '.join(' '.join(names) for names in SPELLINGS)}; "
            "use a model pretrained for fill-in-the-middle or add the tokens to its tokenizer"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, prefix: str, suffix: str) -> tuple[int, ...]:
        """Token ids of the PSM prompt."""
        return (self.prefix, *self.encode(prefix), self.suffix, *self.encode(suffix), self.middle)


def complete(problem: Mapping[str, Any], completion: str) -> str:
    """The source with `completion` in the hole."""
    return problem["prefix"] + completion + problem["suffix"]


HoleKind = Literal["single-line", "multi-line", "random-span"]


@dataclass(frozen=True, slots=True)
class Hole:
    """A source cut in three: `prefix + middle + suffix` is the whole, `middle` is what was cut out."""

    prefix: str
    middle: str
    suffix: str


def function_body(source: str, name: str) -> tuple[int, int]:
    """[start, end) in characters of function `name`'s body, docstring left out; whole lines where it has its own.

    `DataError` if the source does not parse, has no such function, or the function is a docstring only.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"source of {name!r} does not parse as Python: {error}; expected a complete module") from error
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    found = next((node for node in functions if node.name == name), None)
    if found is None:
        raise DataError(f"source has no function {name!r}; name a function it defines")
    statements = found.body[1:] if ast.get_docstring(found, clean=False) is not None else found.body
    if not statements:
        raise DataError(f"function {name!r} has a docstring and no other statement; there is nothing to cut out")
    lines = _lines(source)
    row, last_row = statements[0].lineno - 1, statements[-1].end_lineno
    column = len(lines[row].encode()[: statements[0].col_offset].decode())  # ast counts UTF-8 bytes
    if not lines[row][:column].strip():
        column = 0
    return sum(map(len, lines[:row])) + column, sum(map(len, lines[:last_row]))


def holes(
    source: str, body: tuple[int, int], kind: HoleKind, *, seed: int | str = 0, spans: int = 10
) -> Iterator[Hole]:
    """Cut holes into `source[body[0]:body[1]]`.

    single-line: each non-blank line in turn. multi-line: each contiguous run of lines that begins and ends with a
    non-blank one. Both keep the indentation in the hole and the last line's end in the suffix. random-span: `spans`
    holes between two characters drawn uniformly, reproducible by `seed`.
    """
    start, end = body
    if kind == "random-span":
        rng = random.Random(seed)
        for _ in range(spans if end > start else 0):
            left, right = sorted(rng.sample(range(start, end + 1), 2))
            yield _cut(source, left, right)
        return
    lines = _line_spans(source, start, end)
    for first, (left, _) in enumerate(lines):
        last_lines = lines[first : first + 1] if kind == "single-line" else lines[first:]
        for _, right in last_lines:
            yield _cut(source, left, right)


def _line_spans(source: str, start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) of each non-blank line within a span, line ends left out."""
    found = []
    for line in _lines(source[start:end]):
        if line.strip():
            found.append((start, start + len(line.rstrip("\r\n"))))
        start += len(line)
    return found


def _lines(text: str) -> list[str]:
    return io.StringIO(text).readlines()  # as ast counts lines; str.splitlines also breaks at form feeds and others


def _cut(source: str, left: int, right: int) -> Hole:
    return Hole(source[:left], source[left:right], source[right:])
