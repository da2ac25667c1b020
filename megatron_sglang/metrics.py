"""Numbers a run reports, each with the way it is reduced over micro-batches and ranks.

    Mean(sum, count)   sums add, counts add; NaN when nothing was counted
    Max(value)         the larger one; NaN wins
    Sum(value)         adds
    Last(value)        the later one (over ranks: the highest rank's)

Values are floats or 0-dim tensors; tensors stay on their device until they are asked for, so a micro-batch costs no
device synchronisation. Over ranks, which need not hold the same metrics:

    merge(from_rows(rows) for rows in comm.gather(to_rows(merge(parts))))

Names users know:
    train/{loss,clip_fraction,ratio,kl_old,kl_old_k1,kl_ref,entropy,tis_weight,grad_norm,learning_rate}
    train/{logprob_gap_mean,logprob_gap_max,token_mult_prob_error,kl_rollout,response_length}
    train/{padding,micro_batches}
    train/routing_disagreement, with --moe-enable-routing-replay
    rollout/{reward,pass_rate,response_length,tokens,truncated,informative_groups,unique}
    eval/{pass_rate,reward}   eval/pass_rate/<family>
    timing_s/<phase>   perf/tokens_per_s
    sync/{version,tensors,buckets,bytes,update_norm,cast_loss,<phase>_s}
    train/tokens: of prompts and completions in the rollout batch, padding not counted
    memory/{build,train,sync,rollout,release,logprobs}_{free,allocated,reserved}_gb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sglang.errors import MegatronSglangError

Scalar = float | torch.Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    sum: Scalar
    count: Scalar = 1.0

    def merge(self, later: Mean) -> Mean:
        return Mean(self.sum + later.sum, self.count + later.count)

    def numbers(self) -> tuple[Scalar, ...]:
        return self.sum, self.count

    def value(self) -> float:
        count = float(self.count)
        return float(_tensor(self.sum)) / count if count else math.nan


@dataclass(frozen=True, slots=True)
class _Single:
    number: Scalar

    def numbers(self) -> tuple[Scalar, ...]:
        return (self.number,)

    def value(self) -> float:
        return float(_tensor(self.number))


@dataclass(frozen=True, slots=True)
class Max(_Single):
    def merge(self, later: Max) -> Max:
        # torch.maximum lets NaN win whichever side it is on; Python's max does not.
        return Max(torch.maximum(_tensor(self.number), _tensor(later.number)))


@dataclass(frozen=True, slots=True)
class Sum(_Single):
    def merge(self, later: Sum) -> Sum:
        return Sum(self.number + later.number)


@dataclass(frozen=True, slots=True)
class Last(_Single):
    def merge(self, later: Last) -> Last:
        return later


Metric = Mean | Max | Sum | Last
_KINDS: dict[str, Callable[..., Metric]] = {kind.__name__: kind for kind in (Mean, Max, Sum, Last)}


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """All metrics of all parts, in order; a name missing from a part is simply not added to."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _merge_two(name, merged[name], metric) if name in merged else metric
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers to report; a mean over nothing is NaN."""
    return {name: metric.value() for name, metric in metrics.items()}


def to_rows(metrics: Mapping[str, Metric]) -> list[tuple[Any, ...]]:
    """(name, kind, number, ...) of each metric: JSON values, to be sent to another rank."""
    return [
        (name, type(metric).__name__, *(_tensor(number).item() for number in metric.numbers()))
        for name, metric in metrics.items()
    ]


def from_rows(rows: Iterable[Sequence[Any]]) -> dict[str, Metric]:
    """Inverse of `to_rows`, with floats."""
    return {name: _KINDS[kind](*numbers) for name, kind, *numbers in rows}


def _merge_two(name: str, earlier: Any, later: Any) -> Metric:
    if type(earlier) is not type(later):
        raise MegatronSglangError(
            f"metric {name!r} is a {type(earlier).__name__} in one part and a {type(later).__name__} in another; "
            "give it one kind everywhere"
        )
    return earlier.merge(later)


def _tensor(number: Scalar) -> torch.Tensor:
    return torch.as_tensor(number, dtype=torch.float64).detach()
