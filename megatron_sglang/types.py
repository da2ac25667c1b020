"""The records that flow through the pipeline. No torch, nothing heavy.

    Prompt -> Completion -> Score -> RolloutGroup -> TrainSample -> (Megatron) -> SyncReport

Index suffixes in names: `_P` prompts of a rollout batch, `_G` members of a group, `_T` tokens.
Records are frozen; lengths are checked where they are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem as the engine sees it (token ids) and as its verifier sees it (`problem`).

    >>> Prompt("int/7", (1, 40, 2, 41, 3), "fim_python", {"prefix": "def f(a):\\n    return ", "suffix": "\\n"})
    """

    id: str
    """Unique within its data set, stable between runs."""
    token_ids_T: tuple[int, ...]
    data_source: str
    """Which verifier scores it, as verl's column of that name."""
    problem: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs; JSON values only."""

    def __post_init__(self) -> None:
        if not self.token_ids_T:
            raise ValueError(f"prompt {self.id!r} has no tokens")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is drawn. `seed` makes a request reproducible whatever else is in the batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_new_tokens: int = 24
    min_new_tokens: int = 0
    """No stop before so many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Texts that end a completion wherever they appear in it; the token that completes one is its last."""
    seed: int | None = None
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each position."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt, one completion wanted; a group of G is G requests that differ in `sampling.seed`."""

    token_ids_T: tuple[int, ...]
    sampling: SamplingParams
    session_id: str = ""
    """Requests of one session go to the same engine, which has their common prefix in its cache."""
    adapter: str = ""
    """LoRA adapter that serves it, by name; empty: the engine's weights as they are."""
    routing_from: int | None = None
    """Return the experts that processed its tokens from this position on, those of the prompt included; None: return
    none."""
    stop_from: int | None = None
    """Position in `token_ids_T` where the completion began that this request continues: stop texts are looked for from
    there on. None: only in what is sampled now."""


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The experts that the engine's layers chose for consecutive tokens that it processed; see `routing.py`.

    An engine processes all tokens of a sequence but the last that it sampled."""

    tokens: int
    width: int
    """Bytes of an expert's number, 1 or 2."""
    data: bytes
    """Unsigned little-endian [tokens, layers, top_k], all decoder layers; zeros where one has no experts."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came after a prompt: ids (the stop token included), their logprobs under the sampling distribution, and the
    version of the weights that produced them. Of several turns: all tokens after the first prompt, observations too."""

    token_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    """0.0 where a token was not sampled."""
    finish_reason: FinishReason
    weight_version: int
    """Of the last sampled token."""
    text: str = ""
    """Decoded without the stop token or stop text; filled by the rollout, not by the engine."""
    stopped_by: str = ""
    """The stop text that ended it and follows `text`, empty for any other end; filled by the rollout."""
    loss_mask_T: tuple[int, ...] = ()
    """1 where the policy sampled the token, 0 where it observed it; empty: sampled everywhere."""
    versions_T: tuple[int, ...] = ()
    """Weight version of each token; empty: `weight_version` everywhere."""
    top_logprobs_T: tuple[Mapping[int, float], ...] = ()
    """Token id -> logprob of the likeliest tokens at each position, where they were asked for."""
    turns: int = 1
    routed_experts: RoutedExperts | None = None
    """Of the tokens from the request's `routing_from` to the last but one; None: not asked for, or aborted before."""

    @property
    def trained_versions(self) -> set[int]:
        """Weight versions that sampled the tokens which the loss counts."""
        versions_T = self.versions_T or (self.weight_version,) * len(self.token_ids_T)
        return {version for version, m in zip(versions_T, self.loss_mask_T or (1,) * len(versions_T), strict=True) if m}

    def __post_init__(self) -> None:
        for name in ("logprobs_T", "loss_mask_T", "versions_T", "top_logprobs_T"):
            values = getattr(self, name)
            if len(values) != len(self.token_ids_T) and (values or name == "logprobs_T"):
                raise ValueError(
                    f"completion has {len(self.token_ids_T)} tokens but {len(values)} {name}; they must match"
                )


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict: `value` is the reward, `passed` whether the answer is entirely right."""

    value: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """G completions of one prompt with their scores."""

    prompt: Prompt
    completions_G: tuple[Completion, ...]
    scores_G: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.completions_G) != len(self.scores_G):
            raise ValueError(
                f"group of {self.prompt.id!r} has {len(self.completions_G)} completions but {len(self.scores_G)} scores"
            )


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence ready for the loss. `rollout_logprobs_T` and `loss_mask_T` belong to `response_ids_T`."""

    prompt_ids_T: tuple[int, ...]
    response_ids_T: tuple[int, ...]
    rollout_logprobs_T: tuple[float, ...]
    advantage: float
    reward: float
    weight_version: int
    loss_mask_T: tuple[int, ...] = ()
    """1 where the loss counts the token, 0 where not; empty: everywhere."""
    routed_experts: RoutedExperts | None = None
    """Of all tokens of prompt and response but the last; None: the trainer's routers choose."""
    oldest_version: int | None = None
    """The oldest weight version that sampled a token which the loss counts; None: there is but one."""

    def __post_init__(self) -> None:
        if self.routed_experts is not None and self.routed_experts.tokens != self.length - 1:
            raise ValueError(
                f"sample has {self.length} tokens but the routed experts of {self.routed_experts.tokens}; expected "
                "those of all tokens but the last"
            )
        for name in ("rollout_logprobs_T", "loss_mask_T"):
            values = getattr(self, name)
            if len(values) != len(self.response_ids_T) and (values or name != "loss_mask_T"):
                raise ValueError(f"sample has {len(self.response_ids_T)} response tokens but {len(values)} {name}")

    @property
    def length(self) -> int:
        return len(self.prompt_ids_T) + len(self.response_ids_T)

    def is_of(self, version: int) -> bool:
        """Whether no token that the loss counts was sampled by older weights than `version`."""
        oldest = self.weight_version if self.oldest_version is None else self.oldest_version
        return version <= oldest or not any(self.loss_mask_T or (1,))


@dataclass(frozen=True, slots=True)
class MergeFidelity:
    """What merging the adapters changed in one weight version, over the whole model, and what the cast left of it."""

    update_norm: float
    """L2 norm of (merged - base) over all adapted weights, before the cast to the engine's dtype."""
    cast_loss: float
    """L2 norm of what that cast lost, as a share of `update_norm`; 0.0 in fp32."""
    changed: float
    """Share of the adapted weights' elements that are not the base's after the cast."""
    layers: Mapping[int, tuple[float, float]]
    """Decoder layer -> (update_norm, cast_loss) of it alone."""

    @classmethod
    def of(cls, sums: Mapping[int, Sequence[float]]) -> MergeFidelity:
        """sums: decoder layer (-1: outside of them) -> |merged - base|^2, |what the cast lost|^2, elements that
        changed, elements."""
        update, lost, changed, elements = (sum(column) for column in zip(*(sums.values() or [[0.0] * 4]), strict=True))
        layers = {layer: _norms(*found[:2]) for layer, found in sorted(sums.items()) if layer >= 0}
        return cls(*_norms(update, lost), changed / elements if elements else 0.0, layers)


def _norms(update: float, lost: float) -> tuple[float, float]:
    return math.sqrt(update), math.sqrt(lost / update) if update else 0.0


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one published weight version cost and what is known about it. Seconds by phase; bytes on the wire."""

    version: int
    tensors: int
    buckets: int
    bytes: int
    seconds: Mapping[str, float]
    fidelity: MergeFidelity
    engine_digest: str
    """Digest of all parameters of all engine ranks after the load."""
