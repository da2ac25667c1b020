"""Stop texts, matched exactly while tokens arrive. No torch, nothing heavy.

    matcher = StopMatcher(["\\n\\n", "</answer>"], tokenizer.decode)
    for ids in arriving:
        emit(matcher.feed(ids))         # text that is certainly part of the answer
        if matcher.matched is not None:
            break                       # keep the first `matcher.kept` tokens
    emit(matcher.finish())

What counts is the decoded text: a stop text may lie across tokens, begin or end inside one, and be spelled in tokens in
many ways, so no list of token ids stands for it. The last token of its usual spelling, which is often taken instead,
ends answers that do not contain the text.

Of several stop texts the one that ends first in the text wins, of those that end together the longest. The cost is
linear in the tokens: texts are matched by Knuth-Morris-Pratt automata, character by character, and only the last few
tokens are decoded again, which gives the text that decoding all of them would give (as text-generation servers do it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sglang.errors import ConfigError

UNKNOWN = "\ufffd"
"""What decoders give for bytes that are no character, or none yet."""

WINDOW = 64
"""Tokens decoded again at most, where a decoder gives no finished character for so long."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""


class TextStream:
    """Token ids in, text out, each character as soon as no later token can change it.

    `decode` may drop the space before the first word, as SentencePiece's does, and may give U+FFFD for characters that
    are cut. It must not change text that a later token follows: `clean_up_tokenization_spaces` must be off.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        """Tokens decoded together: those whose text is out, which give the rest its context, then those pending."""
        self._known = 0
        self._known_text = ""
        """Tokens of the window whose text is out, and what they decode to alone."""
        self._out = 0
        """Characters of the window's text that are out."""

    def feed(self, token_id: int) -> str:
        """Text that has become certain."""
        self._window.append(token_id)
        text = self._decode(self._window)
        sure = text.rstrip(UNKNOWN)
        new = sure[self._out :]
        self._out = max(self._out, len(sure))
        grown = len(text) > len(self._known_text)
        if (grown and sure == text) or len(self._window) >= WINDOW:
            new += text[self._out :]
            self._window = self._window[self._known :]
            self._known, self._known_text = len(self._window), self._decode(self._window)
            self._out = len(self._known_text)
        return new

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character."""
        left = self._decode(self._window)[self._out :] if self._window else ""
        self._out += len(left)
        return left


class StopMatcher:
    """Finds where a completion must end. `ConfigError` for an empty stop text, or one with U+FFFD in it.

    decode: token ids -> text, see `TextStream`. ignore_first: stop texts that are complete within so many tokens do not
    count (min_new_tokens). Without stop texts it is a decoder that tells what is certain.
    """

    def __init__(self, stops: Sequence[str], decode: Decode, *, ignore_first: int = 0) -> None:
        for stop in stops:
            if not stop or UNKNOWN in stop:
                raise ConfigError(
                    f"stop text {stop!r} cannot end a completion; expected a text without U+FFFD, which stands for "
                    "bytes that are no text; use stop_token_ids for tokens"
                )
        self._automata = [_Automaton(stop) for stop in dict.fromkeys(stops)]
        self._stream = TextStream(decode)
        self._ignore_first = ignore_first
        self._parts: list[str] = []
        self._held = ""
        """Text that may turn out to be the start of a stop text."""
        self.kept = 0
        """Tokens of the completion so far; after a match, up to and with the one that completed the stop text."""
        self.matched: str | None = None
        """The stop text that was found."""

    @property
    def text(self) -> str:
        """All that `feed` and `finish` have given: after a match, everything before the stop text."""
        return "".join(self._parts)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Newly certain text. After a match nothing changes any more."""
        new = []
        for token_id in token_ids:
            if self.matched is not None:
                break
            self.kept += 1
            new.append(self._scan(self._stream.feed(token_id)))
        return self._emit("".join(new))

    def finish(self) -> str:
        """The completion has ended: the text that was held back, or nothing if a stop text ended it."""
        if self.matched is not None:
            return ""
        left, self._held = self._held + self._stream.finish(), ""
        return self._emit(left)

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _scan(self, text: str) -> str:
        """Advance over `text`; what of it and of the held text is certain now."""
        if not self._automata:
            return text
        counts = self.kept > self._ignore_first
        longest = 0
        for position, character in enumerate(text):
            ended: list[str] = []
            longest = 0
            for automaton in self._automata:
                if automaton.advance(character):
                    ended.append(automaton.text)
                longest = max(longest, automaton.state)
            if ended and counts:
                self.matched = max(ended, key=len)
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole[: len(whole) - len(self.matched)]
        whole = self._held + text
        if not text:
            return ""
        self._held = whole[len(whole) - longest :]
        return whole[: len(whole) - longest]


class _Automaton:
    """Knuth-Morris-Pratt: `state` is the length of the longest proper prefix of `text` that what was read ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._shorter = [0] * (len(text) + 1)
        """By length of a matched prefix: that of the next shorter one that is also its suffix."""
        length = 0
        for end in range(1, len(text)):
            while length and text[end] != text[length]:
                length = self._shorter[length]
            length += text[end] == text[length]
            self._shorter[end + 1] = length

    def advance(self, character: str) -> bool:
        """Read one character; True if the text is complete with it."""
        while self.state and self.text[self.state] != character:
            self.state = self._shorter[self.state]
        self.state += self.text[self.state] == character
        if self.state == len(self.text):
            self.state = self._shorter[self.state]
            return True
        return False
