"""OpenAI's objects for SkyRL's `chat_completion` and `completion`: what a body asks to be shown, and the answer.

    asked                                       in each choice
    chat: logprobs true, top_logprobs N         logprobs.content: token, logprob, bytes, the N likeliest
    text: logprobs N                            logprobs.tokens, token_logprobs, top_logprobs, text_offset

A token is shown as the tokenizer decodes it alone, so a part of a character is U+FFFD; ids are exact in
`generate` only. The stop token counts as sampled, as everywhere here.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sglang.errors import ConfigError
from megatron_sglang.stops import Decode
from megatron_sglang.types import Completion


@dataclass(frozen=True, slots=True)
class Shown:
    """How one body is answered. `ConfigError` for what has no answer in one dictionary."""

    chat: bool
    model: str
    count: int
    """Choices."""
    logprobs: bool

    @staticmethod
    def taken_from(body: dict[str, Any], *, chat: bool) -> Shown:
        """What is not the sampler's is taken out of `body`; `logprobs` is left as `skyrl_names.sampling` knows it."""
        if body.pop("stream", False):
            raise ConfigError(
                "stream=True has no answer in one dictionary; use EngineClient.stream or the HTTP endpoint"
            )
        count = body.pop("n", None)
        logprobs = body.get("logprobs") is not None
        if chat:
            logprobs, top = bool(body.pop("logprobs", False)), body.pop("top_logprobs", None)
            if top and not logprobs:
                raise ConfigError(f"top_logprobs={top} needs logprobs=True")
            body["logprobs"] = (top or 0) if logprobs else None
        return Shown(chat, body.pop("model", None) or "", 1 if count is None else count, logprobs)

    def answer(self, prompt_tokens: int, found: Sequence[Completion], decode: Decode) -> dict[str, Any]:
        """The whole object."""
        used = sum(len(one.token_ids_T) for one in found)
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": [self._choice(index, one, decode) for index, one in enumerate(found)],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": used,
                "total_tokens": prompt_tokens + used,
            },
            "weight_version": min((one.weight_version for one in found), default=None),
        }

    def _choice(self, index: int, one: Completion, decode: Decode) -> dict[str, Any]:
        text = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
        shown = None
        if self.logprobs:
            shown = _chat_logprobs(one, decode) if self.chat else _text_logprobs(one, decode)
        return {"index": index, "finish_reason": one.finish_reason, "logprobs": shown, **text}


def _top(one: Completion) -> Sequence[Mapping[int, float]]:
    return one.top_logprobs_T or ({},) * len(one.token_ids_T)


def _chat_logprobs(one: Completion, decode: Decode) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = decode([token])
        return {"token": name, "logprob": logprob, "bytes": list(name.encode(errors="replace"))}

    rows = zip(one.token_ids_T, one.logprobs_T, _top(one), strict=True)
    return {
        "content": [
            entry(token, logprob) | {"top_logprobs": [entry(*likely) for likely in top.items()]}
            for token, logprob, top in rows
        ]
    }


def _text_logprobs(one: Completion, decode: Decode) -> dict[str, Any]:
    names = [decode([token]) for token in one.token_ids_T]
    rows = zip(names, one.logprobs_T, _top(one), strict=True)
    return {
        "tokens": names,
        "token_logprobs": list(one.logprobs_T),
        "top_logprobs": [{decode([token]): value for token, value in top.items()} | {n: lp} for n, lp, top in rows],
        "text_offset": [0, *itertools.accumulate(map(len, names))][: len(names)],
    }
