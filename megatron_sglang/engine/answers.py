"""SGLang's /generate: what is asked of it, and how an answer is read and checked.

request.sampling      in the body                            in the answer's meta_info
logprobs, always      return_logprob                         output_token_logprobs: [logprob, token id, null]
top_logprobs N        top_logprobs_num                       output_top_logprobs: N of these at each position
routing_from N        return_routed_experts,                 routed_experts, of the last event: base64 of int32
                      routed_experts_start_len               [tokens N to the last but one, layers, top_k]
min_new_tokens, stop  never sent: SGLang refuses them without a tokenizer; see client.py
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sglang import routing
from megatron_sglang.errors import ConfigError, EngineError
from megatron_sglang.types import FinishReason, GenerateRequest, RoutedExperts, SamplingParams

FORBIDDEN = -1e9
"""Bias on the logits of tokens that must not be drawn: their probability becomes exactly 0."""

ABORTED = 499
"""Status of a request that was aborted before SGLang's scheduler had it."""

NO_VERSION = -1
"""Weight version of a completion that was aborted before its first token."""

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def sampling_params(sampling: SamplingParams, forbidden: Collection[int] = ()) -> dict[str, Any]:
    """SGLang's sampling_params. forbidden: tokens that must not be drawn; with any, no token ends the completion."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        # Without one, an engine that draws by seed gives every request the same.
        "sampling_seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
    }
    if forbidden:
        params |= {"logit_bias": {str(token): FORBIDDEN for token in sorted(forbidden)}, "ignore_eos": True}
    return params


def batch_body(requests: Sequence[GenerateRequest]) -> dict[str, Any]:
    """Body of one call for several completions. `ConfigError` where they differ in what such a call has once."""
    body: dict[str, Any] = {
        "input_ids": [list(request.token_ids_T) for request in requests],
        "sampling_params": [sampling_params(request.sampling) for request in requests],
        "return_logprob": True,
    }
    if any(request.sampling.top_logprobs for request in requests):
        body["top_logprobs_num"] = [request.sampling.top_logprobs for request in requests]
    if any(request.adapter for request in requests):
        body["lora_path"] = [request.adapter or None for request in requests]
    if starts := {request.routing_from for request in requests if request.routing_from is not None}:
        if len(starts) > 1:  # SGLang takes one for the whole call
            raise ConfigError(
                f"requests in one call ask for routed experts from {sorted(starts)} on; give them one routing_from, or "
                "use client().generate"
            )
        body |= {"return_routed_experts": True, "routed_experts_start_len": starts.pop()}
    return body


def body_of(request: GenerateRequest, rid: str, *, forbidden: Collection[int] = (), every: int = 1) -> dict[str, Any]:
    """Body of a call for one completion. every: tokens in each event, if it is streamed."""
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": list(request.token_ids_T),
        "sampling_params": sampling_params(request.sampling, forbidden) | {"stream_interval": every},
        "return_logprob": True,
    }
    if request.sampling.top_logprobs:
        body["top_logprobs_num"] = request.sampling.top_logprobs
    if request.adapter:
        body["lora_path"] = request.adapter
    if request.routing_from is not None:
        body |= {"return_routed_experts": True, "routed_experts_start_len": request.routing_from}
    return body


@dataclass(frozen=True, slots=True)
class Answer:
    """What one answer, or one event of a stream, says of one completion."""

    token_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    finish_reason: FinishReason | None
    matched: int | None
    """The token that stopped it."""
    weight_version: int
    top_logprobs_T: tuple[Mapping[int, float], ...] = ()
    routed_experts: RoutedExperts | None = None
    """Of the whole completion, with its end."""


NOTHING = Answer((), (), "abort", None, NO_VERSION)
"""That nothing more was sampled when a request was aborted."""


def read(reply: Mapping[str, Any], known: int = 0, routing_from: int | None = None) -> Answer:
    """The tokens of `reply` after the first `known`. `EngineError` where it contradicts itself, or comes without the
    experts that were asked for.

    SGLang's streams repeat all tokens in each event, or with incremental_streaming_output give the new ones only; an
    aborted request may repeat its last. So what is new is counted from the end.
    """
    if "error" in reply:
        error = reply["error"]
        if isinstance(error, Mapping) and error.get("code") == ABORTED:
            return NOTHING
        raise EngineError(f"engine refused a request: {str(error)[:500]}")
    meta = reply["meta_info"]
    finish, matched = _finish(meta)
    ids = reply["output_ids"]
    new = meta.get("completion_tokens", len(ids)) - known
    logprobs = meta.get("output_token_logprobs") or []
    if new < 0 or len(logprobs) < new:
        raise EngineError(
            f"engine returned {known + new} tokens of which {known} were known, and logprobs of {len(logprobs)}"
        )
    logprobs = logprobs[len(logprobs) - new :]
    new_ids = tuple(token for _, token, *_ in logprobs)
    if finish != "abort" and new_ids != tuple(ids[len(ids) - new :]):
        raise EngineError(f"engine returned {len(ids)} tokens but logprobs of {len(logprobs)} or of other tokens")
    if not all(logprob is not None and math.isfinite(logprob) for logprob, *_ in logprobs):
        raise EngineError("engine returned logprobs that are not finite; its weights or its arithmetic are broken")
    top = meta.get("output_top_logprobs") or []
    return Answer(
        new_ids,
        tuple(logprob for logprob, *_ in logprobs),
        finish,
        matched,
        _version(meta["weight_version"]),
        tuple({token: logprob for logprob, token, *_ in row} for row in top[len(top) - new :]) if top else (),
        None if routing_from is None or finish is None else _routing(meta, finish, routing_from),
    )


def _routing(meta: Mapping[str, Any], finish: FinishReason, start: int) -> RoutedExperts | None:
    found = meta.get("routed_experts")
    if found is not None:
        return routing.of_engine(found, meta["prompt_tokens"] + meta["completion_tokens"] - 1 - start)
    if finish == "abort":  # before it was processed
        return None
    raise EngineError(
        "engine returned no routed experts; start it with --enable-return-routed-experts (--moe-enable-routing-replay "
        "does it for engines of a run), or leave --moe-enable-routing-replay out"
    )


def _finish(meta: Mapping[str, Any]) -> tuple[FinishReason | None, int | None]:
    found = meta["finish_reason"]
    if found is None:
        return None, None
    reason = _FINISH.get(found.get("type", ""))
    matched = found.get("matched")
    if reason is None or found.get("status_code") or isinstance(matched, str):
        raise EngineError(
            f"engine ended a request with {str(found)[:500]}, expected one of {', '.join(_FINISH)}; see its log"
        )
    return reason, matched


def _version(served: str) -> int:
    """Number of a version; those who serve weights that nobody published say "default", which is version 0."""
    try:
        return 0 if served == "default" else int(served)
    except ValueError as error:
        raise EngineError(f"engine generated with weight version {served!r}, expected a number") from error
