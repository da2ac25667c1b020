"""Exact stops, held against decoding every prefix anew; with the real decoders of the `tokenizers` package."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from megatron_sglang.errors import ConfigError
from megatron_sglang.stops import UNKNOWN, Decode, StopMatcher

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model" / "tokenizer.json"


@dataclass(frozen=True)
class Expected:
    kept: int
    matched: str | None
    given: tuple[str, ...]
    """Text after each token."""
    text: str


def decode_all_prefixes(ids: Sequence[int], stops: Sequence[str], decode: Decode, ignore_first: int) -> Expected:
    """What `StopMatcher` must find, by the plain definition."""

    def sure(count: int) -> str:
        # Decoders of byte tokens take a whole run of characters back while its last one is cut.
        return max((decode(ids[:n]).rstrip(UNKNOWN) for n in range(count + 1)), key=len)

    given: list[str] = []
    ignored = len(sure(ignore_first))
    for count in range(1, len(ids) + 1):
        text = sure(count)
        starts = [(stop, start) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
        found = [(start + len(stop), start, stop) for stop, start in starts if start + len(stop) > ignored]
        if count > ignore_first and found:
            _, start, stop = min(found)
            return Expected(count, stop, (*given, text[:start]), text[:start])
        held = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        given.append(text[: len(text) - held])
    whole = sure(len(ids))
    return Expected(len(ids), None, tuple(given), whole + decode(ids)[len(whole) :])


def run(ids: Sequence[int], stops: Sequence[str], decode: Decode, ignore_first: int) -> Expected:
    matcher = StopMatcher(stops, decode, ignore_first=ignore_first)
    given: list[str] = []
    for token in ids:
        matcher.feed([token])
        given.append(matcher.text)
        if matcher.matched is not None:
            break
    matcher.finish()
    return Expected(matcher.kept, matcher.matched, tuple(given), matcher.text)


# ---- token vocabularies: a text becomes ids in an arbitrary way, not in the tokenizer's own ----

ALPHABET = "ab\n é你🙂"
TEXTS = st.text(ALPHABET, max_size=16)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=3)
_ids: dict[tuple[str, bytes], int] = {}
_pieces: list[tuple[str, bytes]] = []


def _id(kind: str, value: bytes) -> int:
    if (kind, value) not in _ids:
        _ids[kind, value] = len(_pieces)
        _pieces.append((kind, value))
    return _ids[kind, value]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


ALPHABET_OF_BYTES = _byte_alphabet()
BYTE_LEVEL = decoders.ByteLevel()
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def decode_bytes(ids: Sequence[int]) -> str:
    pieces = ["".join(ALPHABET_OF_BYTES[byte] for byte in _pieces[token][1]) for token in ids]
    return BYTE_LEVEL.decode(pieces) if pieces else ""


def decode_pieces(ids: Sequence[int]) -> str:
    pieces = [
        f"<0x{value[0]:02X}>" if kind == "byte" else value.decode() for kind, value in map(_pieces.__getitem__, ids)
    ]
    return SENTENCEPIECE.decode(pieces) if pieces else ""


@st.composite
def byte_level_ids(draw: st.DrawFn) -> list[int]:
    """Bytes of a text, or any bytes, cut anywhere: characters lie across tokens, and some never become one."""
    data = draw(
        st.one_of(
            TEXTS.map(str.encode),
            st.binary(max_size=16),
            st.tuples(TEXTS, st.binary(max_size=2), TEXTS).map(lambda t: t[0].encode() + t[1] + t[2].encode()),
        )
    )
    ids = []
    while data:
        size = draw(st.integers(1, 4))
        ids.append(_id("bytes", data[:size]))
        data = data[size:]
    return ids


@st.composite
def sentencepiece_ids(draw: st.DrawFn) -> list[int]:
    """Pieces of a text, some characters as bytes, and perhaps an end in the middle of a character."""
    text = draw(TEXTS).replace(" ", "▁")
    ids = []
    while text:
        if draw(st.booleans()):
            size = draw(st.integers(1, 3))
            ids.append(_id("piece", text[:size].encode()))
        else:
            size = 1
            ids += [_id("byte", bytes([byte])) for byte in text[0].replace("▁", " ").encode()]
        text = text[size:]
    return ids[: draw(st.integers(0, len(ids)))]


@settings(max_examples=150)
@given(byte_level_ids(), STOPS, st.integers(0, 4))
def test_byte_level_tokens(ids: list[int], stops: list[str], ignore_first: int) -> None:
    """Stops across tokens, overlapping, within a cut character's token, after bytes that are no text."""
    assert run(ids, stops, decode_bytes, ignore_first) == decode_all_prefixes(ids, stops, decode_bytes, ignore_first)


@settings(max_examples=150)
@given(sentencepiece_ids(), STOPS, st.integers(0, 4))
def test_decoder_that_drops_the_first_space(ids: list[int], stops: list[str], ignore_first: int) -> None:
    """A token alone does not decode to what it adds to the text: its space is lost, or its byte is no character."""
    found, expected = (f(ids, stops, decode_pieces, ignore_first) for f in (run, decode_all_prefixes))
    # How many U+FFFD stand for a character that was never completed is the decoder's whim.
    assert found.text.rstrip(UNKNOWN) == expected.text.rstrip(UNKNOWN)
    assert (found.kept, found.matched, found.given) == (expected.kept, expected.matched, expected.given)


@settings(max_examples=100)
@given(byte_level_ids(), STOPS, st.lists(st.integers(1, 5), max_size=8))
def test_chunks_do_not_matter(ids: list[int], stops: list[str], sizes: list[int]) -> None:
    """An event of a stream holds as many tokens as the engine happens to have."""
    matcher = StopMatcher(stops, decode_bytes)
    left = list(ids)
    for size in [*sizes, len(left)]:
        matcher.feed(left[:size])
        left = left[size:]
    matcher.finish()
    whole = decode_all_prefixes(ids, stops, decode_bytes, 0)
    assert (matcher.kept, matcher.matched, matcher.text) == (whole.kept, whole.matched, whole.text)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.mark.parametrize(
    ("answer", "stop"),
    [("if a > b:\n    return </answer>", "</answer>"), ("x = 1\ny = 2\n\nprint", "\n\n")],
)
def test_the_last_token_of_a_stop_text_is_not_the_stop_text(tokenizer: Tokenizer, answer: str, stop: str) -> None:
    """The common recipe takes the last token of the stop text's spelling as stop_token_id, and cuts answers short."""
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    recipe = tokenizer.encode(stop, add_special_tokens=False).ids[-1]
    cut_by_recipe = tokenizer.decode(ids[: ids.index(recipe) + 1])
    assert stop not in cut_by_recipe
    matcher = StopMatcher([stop], tokenizer.decode)
    matcher.feed(ids)
    assert matcher.matched == stop
    assert matcher.text == answer[: answer.index(stop)]
    assert len(cut_by_recipe) < len(matcher.text)
    assert stop in tokenizer.decode(ids[: matcher.kept])
    assert stop not in tokenizer.decode(ids[: matcher.kept - 1])


@pytest.mark.parametrize("stop", ["", f"a{UNKNOWN}"])
def test_impossible_stop_texts_are_refused(stop: str) -> None:
    """The first would end every completion before it begins, the second matches bytes that are still arriving."""
    with pytest.raises(ConfigError, match="cannot end a completion"):
        StopMatcher([stop], decode_bytes)


@pytest.mark.parametrize("kind", ["text", "cut characters", "special tokens"])
def test_the_cost_is_linear(tokenizer: Tokenizer, kind: str) -> None:
    """Decoding all tokens anew for each new one would take minutes for a long answer."""
    unit = {
        "text": tokenizer.encode("def f(a):\n    return a * 3\n", add_special_tokens=False).ids,
        "cut characters": tokenizer.encode("\u00e9", add_special_tokens=False).ids[:1],
        "special tokens": [0],
    }[kind]
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids)

    ids = (unit * 4000)[:4000]
    matcher = StopMatcher(["</answer>", "\n\n\n", "a" * 200], decode)
    started = time.process_time()
    for token in ids:
        matcher.feed([token])
    assert time.process_time() - started < 1.0
    assert matcher.kept == len(ids)
    assert decoded < 200 * len(ids)
