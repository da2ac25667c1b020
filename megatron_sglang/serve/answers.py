"""OpenAI's objects from what the engine sampled: whole answers, and the chunks of streams.

Beyond OpenAI's there are `weight_version` in every object and, with return_token_ids, in every choice `token_ids`,
`weight_versions` (of each token) and `prompt_token_ids` (in the first chunk of a stream). A stop token counts as
sampled: it is in logprobs, ids and usage, not in the text.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sglang.serve.tokens import Tokens

LEAST_LOGPROB = -9999.0
"""For probability 0, whose logarithm JSON does not have."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is new of one choice: all of it, or a piece."""

    text: str
    token_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    top_logprobs_T: tuple[Mapping[int, float], ...]
    finish_reason: str | None


@dataclass(slots=True)
class Form:
    """How one request is answered."""

    chat: bool
    model: str
    tokens: Tokens
    prompts: Sequence[tuple[int, ...]]
    choices_each: int
    logprobs: bool
    return_token_ids: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)
    """By choice: characters of the tokens that were shown."""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex

    def whole(self, found: Sequence[Sampled], version: int) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choices = []
        for index, one in enumerate(found):
            text = {"message": {"role": "assistant", "content": one.text, "refusal": None}} if self.chat else {}
            choices.append(self._choice(index, one, text or {"text": one.text}, version, first=True))
        usage = self.usage(sum(len(one.token_ids_T) for one in found))
        return self._object("chat.completion" if self.chat else "text_completion", choices, version) | {"usage": usage}

    def chunk(self, index: int, new: Sampled, version: int, *, first: bool) -> dict[str, Any]:
        """A part of choice `index` of a stream."""
        delta = {"role": "assistant", "content": new.text} if first else {"content": new.text} if new.text else {}
        choice = self._choice(index, new, {"delta": delta} if self.chat else {"text": new.text}, version, first=first)
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice], version)

    def shows(self, new: Sampled, *, first: bool) -> bool:
        """Whether a piece is worth a chunk: text may be held back that could begin a stop text."""
        return bool(new.text or new.finish_reason or first or self.logprobs or self.return_token_ids)

    def last_chunk(self, completion_tokens: int, version: int) -> dict[str, Any]:
        """After all choices, where the request has include_usage."""
        found = self._object("chat.completion.chunk" if self.chat else "text_completion", [], version)
        return found | {"usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    # ---- parts ----

    def _object(self, kind: str, choices: list[dict[str, Any]], version: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "weight_version": version,
        }

    def _choice(self, index: int, new: Sampled, text: dict[str, Any], version: int, *, first: bool) -> dict[str, Any]:
        shown = self._chat_logprobs(new) if self.chat else self._text_logprobs(index, new)
        choice = {"index": index, **text, "logprobs": shown, "finish_reason": new.finish_reason}
        if self.return_token_ids:
            choice["token_ids"] = list(new.token_ids_T)
            choice["weight_versions"] = [version] * len(new.token_ids_T)
            if first:
                choice["prompt_token_ids"] = list(self.prompts[index // self.choices_each])
        return choice

    def _chat_logprobs(self, new: Sampled) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for position, (token, logprob) in enumerate(zip(new.token_ids_T, new.logprobs_T, strict=True)):
            top = new.top_logprobs_T[position].items() if new.top_logprobs_T else ()
            content.append(self._entry(token, logprob) | {"top_logprobs": [self._entry(*one) for one in top]})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, raw = self.tokens.name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": raw}

    def _text_logprobs(self, index: int, new: Sampled) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        names = [self.tokens.name(token)[0] for token in new.token_ids_T]
        offsets, end = [], self._offsets.get(index, 0)
        for name in names:
            offsets.append(end)
            end += len(name)
        self._offsets[index] = end
        top = []
        for position, (name, logprob) in enumerate(zip(names, new.logprobs_T, strict=True)):
            likeliest = new.top_logprobs_T[position] if new.top_logprobs_T else {}
            top.append({self.tokens.name(token)[0]: _finite(one) for token, one in likeliest.items()} | {name: logprob})
        return {"tokens": names, "token_logprobs": list(new.logprobs_T), "top_logprobs": top, "text_offset": offsets}


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
