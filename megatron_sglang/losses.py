"""Policy losses on log-probabilities: GSPO, GSPO-token, GRPO, with KL, entropy and off-policy correction. Torch only.

Every loss is a clipped surrogate per token, aggregated to (loss_sum, denominator) for Megatron's
`calculate_per_token_loss` mode, which divides the sum over all micro-batches and ranks of the one by that of the other:

    l_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) * w_t  +  kl_coef * KL_t  -  entropy_coef * H_t

    name        r_t, where d_t = logp_t - old_logp_t               clip         source
    gspo        exp(mean_t d_t), one per sequence                  3e-4 / 4e-4  Zheng et al. 2025, arXiv 2507.18071
    gspo_token  sg[exp(mean_t d_t)] * exp(logp_t - sg[logp_t])     3e-4 / 4e-4  same, sec. 4.3 (sg = stop-gradient)
    grpo        exp(d_t)                                           0.2  / 0.28  Shao et al. 2024, arXiv 2402.03300;
                                                   two clips and token_mean are DAPO's, Yu et al. 2025, arXiv 2503.14476

    aggregation     loss_sum                          denominator (int64)
    sequence_mean   sum over sequences of mean l_t    sequences with a response
    token_mean      sum of l_t                        response tokens
    constant        sum of l_t / longest possible     sequences with a response (Dr. GRPO, Liu et al. 2025, 2503.20783)

KL_t estimates KL(policy || reference), x = ref_logp - logp: k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x (Schulman 2020,
"Approximating KL divergence"). As a loss k1 has gradient 0 in expectation; take k2 or k3.
w_t (`tis`, truncated importance sampling, C = `tis_cap`) corrects for an engine whose probabilities differ from the
trainer's (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), without gradient:
min(exp(old_logp - rollout_logp), C) per "token" or, as the product over tokens, per "sequence"; "masked" is per token,
0 outside [1/C, C] instead of capped.

NaN policy: whatever stands at masked positions never reaches the loss, a metric or a gradient. A non-finite value at a
response position, a non-finite advantage of a sequence with a response, or a ratio that overflows makes loss and
gradients NaN on purpose; the trainer's guard turns that into a skipped step. The clip would hide an infinite ratio.

Context parallelism: `sum_over_context` adds a tensor over the ranks that hold parts of the same sequences; its backward
must add gradients over them too (torch.distributed.nn.functional.all_reduce does). Sequence-level sums and denominators
then repeat on each of these ranks, which cancels in the quotient.

Suffixes: B sequences, T positions (aligned with labels: entry t is about the token at t + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_sglang.config import AlgoConfig
from megatron_sglang.errors import ConfigError
from megatron_sglang.metrics import Max, Mean, Metric

SumOverContext = Callable[[Tensor], Tensor]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
Tis = Literal["off", "token", "sequence", "masked"]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch: [B, T] floating point, `advantages` [B]. Only `logprobs` and `entropy` get gradients."""

    logprobs: Tensor
    """Of the policy being trained."""
    old_logprobs: Tensor
    """Of the policy that sampled, computed by the trainer."""
    mask: Tensor
    """1 on response tokens, else 0; float or bool."""
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    """Of the policy that sampled, as the engine reported them."""
    entropy: Tensor | None = None
    """Entropy of the policy's distribution at each position, nats."""


@dataclass(frozen=True, slots=True)
class LossOptions:
    """How a loss is shaped; the choices are explained in the module's docstring."""

    clip_low: float | None = None
    """None: the loss's own."""
    clip_high: float | None = None
    """None: `clip_low` if that is given, else the loss's own."""
    aggregation: Aggregation = "sequence_mean"
    longest_response: int | None = None
    """Tokens; what "constant" divides by."""
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    tis: Tis = "off"
    tis_cap: float = 2.0

    def __post_init__(self) -> None:
        choices = {"aggregation": Aggregation, "kl_estimator": KlEstimator, "tis": Tis}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use {' or '.join(get_args(choice))}")
        if self.tis_cap < 1:
            raise ConfigError(f"tis_cap={self.tis_cap} would cut down even equal probabilities; set it to 1 or more")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ConfigError(f"clip_low={self.clip_low} is not in [0, 1]; ratios are clipped at 1 - clip_low")
        if self.clip_high is not None and self.clip_high < 0:
            raise ConfigError(f"clip_high={self.clip_high} is negative; ratios are clipped at 1 + clip_high")
        if self.aggregation == "constant" and not (self.longest_response and self.longest_response > 0):
            raise ConfigError(f"longest_response={self.longest_response}: aggregation 'constant' divides by it; set it")

    @staticmethod
    def of(algo: AlgoConfig, longest_response: int) -> LossOptions:
        """The options a run's configuration asks for."""
        return LossOptions(
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            aggregation="sequence_mean" if algo.aggregation == "auto" else algo.aggregation,
            longest_response=longest_response,
            kl_coef=algo.kl_coef or 0.0,
            kl_estimator=algo.kl_estimator,
            entropy_coef=algo.entropy_coef,
            tis=algo.tis,
            tis_cap=algo.tis_cap,
        )


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """`loss_sum` 0-dim with graph, `denominator` 0-dim int64 (0 if nothing is to be learned), metrics without graph."""

    loss_sum: Tensor
    denominator: Tensor
    metrics: dict[str, Metric]


def policy_loss(
    name: str,
    inputs: LossInputs,
    options: LossOptions | None = None,
    sum_over_context: SumOverContext = lambda part: part,
) -> LossOutputs:
    """The named loss of one micro-batch (formulas in the module's docstring).

    Raises `ConfigError` for an unknown name, options the loss does not have, or inputs that the options need.
    """
    options = options or LossOptions()
    rule = _rule(name, options, inputs)
    x = _without_masked(inputs)
    length_B = sum_over_context(x.mask.sum(dim=-1))

    ratio_BT = rule.ratio(x, length_B, sum_over_context)
    low, high = _clips(rule, options)
    plain_BT = ratio_BT * x.advantages[:, None]
    clipped_BT = ratio_BT.clamp(1 - low, 1 + high) * x.advantages[:, None]
    tis_BT = _engine_correction(x, options, sum_over_context)
    policy_BT = -torch.minimum(plain_BT, clipped_BT) * tis_BT

    token_loss_BT = policy_BT
    if options.kl_coef:
        assert x.ref_logprobs is not None
        token_loss_BT = token_loss_BT + options.kl_coef * kl(x.logprobs, x.ref_logprobs, options.kl_estimator)
    if options.entropy_coef:
        assert x.entropy is not None
        token_loss_BT = token_loss_BT - options.entropy_coef * x.entropy

    token_loss_BT = torch.where(x.mask.bool(), token_loss_BT, 0.0)
    loss_sum, denominator = _aggregate(token_loss_BT, x.mask, length_B, options, sum_over_context)
    # A product rather than a choice: the gradients must be NaN too, guards may look at either.
    loss_sum = loss_sum * _one_or_nan(x, ratio_BT, options)

    per_sequence = options.aggregation == "sequence_mean"
    weight_BT = x.mask / length_B.clamp(min=1)[:, None] if per_sequence else x.mask
    metrics: dict[str, Metric] = {
        "train/loss": Mean(loss_sum.detach(), denominator),
        "train/clip_fraction": _mean((plain_BT > clipped_BT).to(x.mask), weight_BT),
        "train/ratio": _mean(ratio_BT, weight_BT),
        "train/tis_weight": _mean(tis_BT, x.mask),
        "train/response_length": Mean(length_B.sum(), (length_B > 0).sum()),
    }
    return LossOutputs(loss_sum, denominator, metrics | _divergences(x))


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) at tokens drawn from the policy; any shape."""
    x = ref_logprobs - logprobs
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "k3":
            return torch.expm1(x) - x


def _gspo_ratio(x: LossInputs, length_B: Tensor, sum_over_context: SumOverContext) -> Tensor:
    mean_log_ratio_B = sum_over_context((x.logprobs - x.old_logprobs).sum(dim=-1)) / length_B.clamp(min=1)
    return mean_log_ratio_B.exp()[:, None].expand_as(x.logprobs)


def _gspo_token_ratio(x: LossInputs, length_B: Tensor, sum_over_context: SumOverContext) -> Tensor:
    return _gspo_ratio(x, length_B, sum_over_context).detach() * (x.logprobs - x.logprobs.detach()).exp()


def _grpo_ratio(x: LossInputs, length_B: Tensor, sum_over_context: SumOverContext) -> Tensor:
    return (x.logprobs - x.old_logprobs).exp()


@dataclass(frozen=True, slots=True)
class _Rule:
    """What makes a named loss: its ratio r_t, its clips, and the aggregations that make sense with it."""

    ratio: Callable[[LossInputs, Tensor, SumOverContext], Tensor]
    clip_low: float
    clip_high: float
    aggregations: tuple[Aggregation, ...]


_RULES = {
    "gspo": _Rule(_gspo_ratio, 3e-4, 4e-4, ("sequence_mean",)),
    "gspo_token": _Rule(_gspo_token_ratio, 3e-4, 4e-4, ("sequence_mean",)),
    "grpo": _Rule(_grpo_ratio, 0.2, 0.28, get_args(Aggregation)),
}
LOSS_NAMES = tuple(_RULES)


def _rule(name: str, options: LossOptions, inputs: LossInputs) -> _Rule:
    if name not in _RULES:
        raise ConfigError(f"policy loss {name!r} is unknown; use one of {', '.join(LOSS_NAMES)}")
    rule = _RULES[name]
    if options.aggregation not in rule.aggregations:
        raise ConfigError(f"policy loss {name!r} has no {options.aggregation!r}; use {' or '.join(rule.aggregations)}")
    needs = {"ref_logprobs": options.kl_coef != 0, "entropy": options.entropy_coef != 0}
    for field, needed in (needs | {"rollout_logprobs": options.tis != "off"}).items():
        if needed and getattr(inputs, field) is None:
            raise ConfigError(f"policy loss {name!r} with {options} needs {field}, which the batch does not have")
    return rule


def _clips(rule: _Rule, options: LossOptions) -> tuple[float, float]:
    """(clip_low, clip_high). Where only the low one is given, the clip is symmetric."""
    low, high = options.clip_low, options.clip_high
    if high is None:
        high = rule.clip_high if low is None else low
    return rule.clip_low if low is None else low, high


def _without_masked(inputs: LossInputs) -> LossInputs:
    """Zeros at masked positions, at least fp32, gradients only where they belong, an empty sequence's advantage 0."""
    kept_BT = inputs.mask.bool()
    precise = torch.promote_types(inputs.logprobs.dtype, torch.float32)

    def keep(value: Tensor) -> Tensor:
        return torch.where(kept_BT, value.to(precise), 0.0)

    def constant(value: Tensor | None) -> Tensor | None:
        return None if value is None else keep(value.detach())

    return LossInputs(
        logprobs=keep(inputs.logprobs),
        old_logprobs=keep(inputs.old_logprobs.detach()),
        mask=kept_BT.to(precise),
        advantages=torch.where(kept_BT.any(dim=-1), inputs.advantages.detach().to(precise), 0.0),
        ref_logprobs=constant(inputs.ref_logprobs),
        rollout_logprobs=constant(inputs.rollout_logprobs),
        entropy=None if inputs.entropy is None else keep(inputs.entropy),
    )


def _aggregate(
    token_loss_BT: Tensor, mask_BT: Tensor, length_B: Tensor, options: LossOptions, sum_over_context: SumOverContext
) -> tuple[Tensor, Tensor]:
    """(loss_sum, denominator) by the table in the module's docstring."""
    if options.aggregation == "token_mean":
        return token_loss_BT.sum(), mask_BT.sum().long()
    divisor_B = length_B.clamp(min=1) if options.aggregation == "sequence_mean" else options.longest_response
    assert divisor_B is not None, "LossOptions asks for it"
    return (sum_over_context(token_loss_BT.sum(dim=-1)) / divisor_B).sum(), (length_B > 0).sum()


def _engine_correction(x: LossInputs, options: LossOptions, sum_over_context: SumOverContext) -> Tensor:
    """w_t [B, T]."""
    if options.tis == "off":
        return torch.ones_like(x.mask)
    assert x.rollout_logprobs is not None
    log_weight_BT = x.old_logprobs - x.rollout_logprobs
    if options.tis == "sequence":
        log_weight_BT = sum_over_context(log_weight_BT.sum(dim=-1))[:, None].expand_as(log_weight_BT)
    weight_BT = log_weight_BT.exp()
    if options.tis == "masked":
        inside_BT = (weight_BT >= 1 / options.tis_cap) & (weight_BT <= options.tis_cap)
        return torch.where(inside_BT, weight_BT, 0.0)
    return weight_BT.clamp(max=options.tis_cap)


def _one_or_nan(x: LossInputs, ratio_BT: Tensor, options: LossOptions) -> Tensor:
    """1, or NaN if any value that the loss is made of is not finite."""
    used = [x.logprobs, x.old_logprobs, x.advantages[:, None], ratio_BT]
    used += [x.ref_logprobs] if options.kl_coef and x.ref_logprobs is not None else []
    used += [x.rollout_logprobs] if options.tis != "off" and x.rollout_logprobs is not None else []
    finite = torch.stack([value.isfinite().all() for value in used]).all()
    return torch.where(finite, 1.0, float("nan"))


def _divergences(x: LossInputs) -> dict[str, Metric]:
    """How far policy, sampling policy, engine and reference are from each other; means over response tokens."""
    metrics: dict[str, Metric] = {
        "train/kl_old": _mean(kl(x.old_logprobs, x.logprobs, "k3"), x.mask),
        "train/kl_old_k1": _mean(kl(x.old_logprobs, x.logprobs, "k1"), x.mask),
    }
    if x.ref_logprobs is not None:
        metrics["train/kl_ref"] = _mean(kl(x.logprobs, x.ref_logprobs, "k3"), x.mask)
    if x.entropy is not None:
        metrics["train/entropy"] = _mean(x.entropy, x.mask)
    if x.rollout_logprobs is not None:
        gap_BT = (x.old_logprobs - x.rollout_logprobs).abs()
        metrics["train/logprob_gap_mean"] = _mean(gap_BT, x.mask)
        metrics["train/logprob_gap_max"] = Max(gap_BT.max() if gap_BT.numel() else gap_BT.sum())
        metrics["train/kl_rollout"] = _mean(kl(x.rollout_logprobs, x.old_logprobs, "k3"), x.mask)
        metrics["train/token_mult_prob_error"] = _mean(gap_BT.exp(), x.mask)
    return metrics


def _mean(value_BT: Tensor, weight_BT: Tensor) -> Mean:
    """Weighted mean; what stands where the weight is 0 does not matter, NaN included."""
    weighted_BT = torch.where(weight_BT > 0, value_BT.detach() * weight_BT, 0.0)
    return Mean(weighted_BT.sum(), weight_BT.sum())
