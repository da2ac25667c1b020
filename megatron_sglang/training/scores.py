"""Logprobs of labels and entropies, differentiable, from logits that may be split over the vocabulary: the mathematics
of `logprobs.py`. On a GPU Triton kernels read the logits once (`score_kernel.py`); elsewhere torch does it in chunks.

Shapes: N rows, V_local columns of a rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 29
"""Of fp32 logits that torch looks at together. All of them would take 7.5 GB a copy for 12,288 tokens of Qwen3."""

LEAST = -1e4
"""Where e^z has long been 0 in fp32. What is multiplied by it stays above this: -infinity times 0 would be NaN."""


def scores(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    entropies: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of the labels' shape in fp32: log p(label) at `temperature`, and the entropy (nats) of p; without `entropies`
    the second is not to be read.

    logits: [..., V_local], of any floating dtype. group: whose ranks have one shard of equal size each, in order; None:
    this rank has all of the vocabulary. Collective over it, forward only. Derivatives are of the first order.
    """
    return _Scored.apply(logits, labels, temperature, group, entropies)


class _Scored(torch.autograd.Function):
    """Nothing of the logits' size is kept but themselves, and their gradient is made in their dtype: fp32 exists in
    registers, or with torch for a chunk of rows at a time, and the softmax is computed again in the backward pass.

    With z = logits / T, p = softmax(z), H the entropy:  d logp(label) / dz = 1[label] - p,  dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        group: torch.distributed.ProcessGroup | None,
        entropies: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = logits.reshape(-1, logits.shape[-1])
        first = 0 if group is None else rows.shape[1] * torch.distributed.get_rank(group)
        local = (labels.reshape(-1) - first).contiguous()
        kernel = _kernel_for(logits)
        reduce = _by_torch if kernel is None else functools.partial(_by_kernel, kernel)
        peak, (label, total, weighted) = reduce(rows, local, temperature, group, entropies)
        entropy = total.log() - weighted / total
        ctx.save_for_backward(logits, local, peak, total, entropy)
        ctx.temperature, ctx.kernel = temperature, kernel
        ctx.set_materialize_grads(False)
        return (label - total.log()).view(labels.shape), entropy.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, local, *reduced = ctx.saved_tensors
        rows = logits.reshape(-1, logits.shape[-1])
        given = [None if grad is None else grad.reshape(-1).contiguous() for grad in grads]
        compute = _gradient_by_torch if ctx.kernel is None else ctx.kernel.gradient
        gradient = compute(rows, local, ctx.temperature, tuple(reduced), *given)
        return gradient.view(logits.shape), None, None, None, None


def _by_kernel(
    kernel: Any,
    rows: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    group: torch.distributed.ProcessGroup | None,
    entropies: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_by_torch`: each shard's sums are counted from its own peak first, so that its logits are read once."""
    peak, sums = kernel.sums(rows, local, temperature, entropies=entropies)
    if group is None:
        return peak, sums
    own, inside = peak.clone(), (local >= 0) & (local < rows.shape[1])
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX, group=group)
    sums = _rebased(sums, (own - peak) / temperature, inside)
    torch.distributed.all_reduce(sums, group=group)
    return peak, sums


def _rebased(sums: torch.Tensor, apart: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """[3, N] sums as they are when z is counted from a higher peak. apart: [N] own peak less that one, over the
    temperature. inside: [N] bool, is the label among this rank's columns? The formula is in `score_kernel.py`."""
    label, total, weighted = sums
    moved = apart.clamp(min=LEAST)
    factor = moved.exp()
    return torch.stack([torch.where(inside, label + apart, label), total * factor, (weighted + moved * total) * factor])


def _by_torch(
    rows: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    group: torch.distributed.ProcessGroup | None,
    entropies: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all shards: [N] peaks of the logits, not scaled, and [3, N] of z = (logits - peak) / T: that of the label,
    the sum of e^z, the sum of z e^z. local: [N] labels, counted from this rank's first column."""
    at, inside = _places(local, rows.shape[1])
    peak = rows.amax(-1).float()
    if group is not None:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX, group=group)
    sums = torch.zeros(3, len(rows), device=rows.device)
    for part in _chunks(rows):
        scaled = _scaled(rows[part], temperature, peak[part])
        # Where another rank has the label, the logit looked at may be -infinity, and that times 0 is NaN.
        sums[0, part] = torch.where(inside[part] > 0, scaled.gather(1, at[part]), 0.0).squeeze(1)
        powers = scaled.exp()
        sums[1, part] = powers.sum(-1)
        if entropies:
            sums[2, part] = powers.mul_(scaled.clamp_(min=LEAST)).sum(-1)
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    return peak, sums


def _gradient_by_torch(
    rows: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    reduced: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    of_logprob: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """As `score_kernel.gradient`."""
    at, inside = _places(local, rows.shape[1])
    peak, total, entropy = (one.unsqueeze(1) for one in reduced)
    by_logprob = torch.zeros_like(total) if of_logprob is None else of_logprob.unsqueeze(1) / temperature
    by_entropy = None if of_entropy is None else of_entropy.unsqueeze(1) / temperature
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for part in _chunks(rows):
        scaled = _scaled(rows[part], temperature, peak[part, 0])
        powers = scaled.exp()
        if by_entropy is not None:
            scaled.clamp_(min=LEAST).add_(entropy[part] - total[part].log()).mul_(powers).mul_(
                -by_entropy[part] / total[part]
            )
        grad = powers.mul_(-by_logprob[part] / total[part])
        if by_entropy is not None:
            grad.add_(scaled)
        grad.scatter_add_(1, at[part], by_logprob[part] * inside[part])
        out[part] = grad
    return out


def _places(local: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 1] each: a column to look at, and 1 where that is the label's, else 0."""
    local = local.unsqueeze(1)
    return local.clamp(0, width - 1), ((local >= 0) & (local < width)).float()


def _scaled(rows: torch.Tensor, temperature: float, peak: torch.Tensor) -> torch.Tensor:
    """A copy in fp32, at most 0."""
    copy = rows.to(torch.float32, copy=True).sub_(peak.unsqueeze(1))
    return copy if temperature == 1 else copy.div_(temperature)


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * rows.shape[1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _kernel_for(logits: torch.Tensor) -> Any:
    """The module whose kernels read such logits where they are; None: torch does, a chunk at a time."""
    if not _is_on_gpu(logits) or (kernel := _kernel()) is None or not kernel.takes(logits):
        return None
    return kernel


def _is_on_gpu(logits: torch.Tensor) -> bool:
    return logits.is_cuda


@functools.cache
def _kernel() -> Any:
    """None where Triton is missing."""
    try:
        from megatron_sglang.training import score_kernel
    except ImportError:
        return None
    return score_kernel
