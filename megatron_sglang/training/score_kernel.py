"""What logprobs and entropies are made of, and their gradient, as Triton kernels: one pass over the logits each.

In torch, a chunk of positions at a time, the same takes some 44 bytes of memory traffic for each bf16 logit forward and
36 backward. Here it is 2 bytes forward and 4 backward, and nothing of the logits' size but the gradient. Needs Triton.

With x the logits of a row, T the temperature, m a peak of the row and z = (x - m) / T, the sums are those of e^z and of
z e^z (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867): when the peak grows by d T, z shrinks by d, so

    sum of e^z  ->  e^-d * sum of e^z,        sum of z e^z  ->  e^-d * (sum of z e^z - d * sum of e^z).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_sglang.training.scores import LEAST

BLOCK = 4096
"""Logits that one program looks at together: 16 for each of its threads."""

WARPS = 8
"""Of a program, which takes one row."""

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LEAST = tl.constexpr(LEAST)


@triton.jit
def _sums(logits, labels, out, rows, width, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * width
    column = tl.arange(0, BLOCK)
    # Finite, so that a row that begins with -infinity does not become NaN.
    peak = tl.full((), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    loaded = tl.load(first + column, mask=column < width, other=float("-inf"))
    for start in range(0, width, BLOCK):
        logit = loaded.to(tl.float32)
        # Under way while warps wait for each other's peak.
        ahead = start + BLOCK + column
        loaded = tl.load(first + ahead, mask=ahead < width, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 0))
        moved = tl.maximum((peak - higher) * scale, _LEAST)
        z = (logit - higher) * scale
        power = tl.exp(z)
        if ENTROPY:
            weighted = (weighted + moved * total) * tl.exp(moved) + power * tl.maximum(z, _LEAST)
        total = total * tl.exp(moved) + power
        peak = higher
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < width)
    own = tl.load(first + label, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, peak)
    tl.store(out + rows + row, tl.where(inside, (own - peak) * scale, 0.0))
    tl.store(out + 2 * rows + row, tl.sum(total, 0))
    if ENTROPY:
        tl.store(out + 3 * rows + row, tl.sum(weighted, 0))


@triton.jit
def _gradient(
    logits,
    labels,
    peaks,
    totals,
    entropies,
    of_logprobs,
    of_entropies,
    out,
    width,
    scale,
    LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, to = logits + row * width, out + row * width
    column = tl.arange(0, BLOCK)
    peak = tl.load(peaks + row)
    total = tl.load(totals + row)
    inverse = 1 / total
    label = tl.load(labels + row).to(tl.int32)
    of_logprob, of_entropy, constant = 0.0, 0.0, 0.0
    if LOGPROB:
        of_logprob = tl.load(of_logprobs + row) * scale
    if ENTROPY:
        of_entropy = tl.load(of_entropies + row) * scale
        constant = tl.load(entropies + row) - tl.log(total)
    for start in range(0, width, BLOCK):
        at = start + column
        z = (tl.load(first + at, mask=at < width, other=float("-inf")).to(tl.float32) - peak) * scale
        probability = tl.exp(z) * inverse
        # log p + H = z + constant
        share = tl.zeros((BLOCK,), tl.float32)
        if LOGPROB:
            share += of_logprob
        if ENTROPY:
            share += of_entropy * (tl.maximum(z, _LEAST) + constant)
        gradient = -probability * share
        if LOGPROB:
            gradient += tl.where(at == label, of_logprob, 0.0)
        tl.store(to + at, gradient.to(out.dtype.element_ty), mask=at < width)


def takes(logits: torch.Tensor) -> bool:
    """Can the kernels read them? bf16, fp16 or fp32, rows one after the other."""
    return logits.dtype in (torch.bfloat16, torch.float16, torch.float32) and logits.is_contiguous()


def sums(
    rows: torch.Tensor, labels: torch.Tensor, temperature: float, *, entropies: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows: [N, V] logits that the kernel `takes`. labels: [N] int64, contiguous, counted from the first column; one
    that is no column counts 0.

    Returns [N] fp32 peaks of the logits, not scaled, and [3, N] fp32: z of the label, the sum of e^z and the sum of
    z e^z, where z is counted from that peak; zeros for the last without entropies.
    """
    count, width = rows.shape
    out = torch.zeros((4, count), dtype=torch.float32, device=rows.device)
    launch: Any = _sums
    if count:
        # Triton launches on the current device, and the logits may lie on another one.
        with torch.cuda.device_of(rows):
            launch[(count,)](
                rows, labels, out, count, width, 1 / temperature, ENTROPY=entropies, BLOCK=BLOCK, num_warps=WARPS
            )
    return out[0], out[1:]


def gradient(
    rows: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    reduced: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    of_logprob: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """[N, V] gradient of the logits, in their dtype and memory of its own. rows, labels: as for `sums`. reduced: [N]
    fp32 peak, sum of e^z and entropy over all shards. of_logprob, of_entropy: [N] fp32, contiguous; None: 0.

    With p = e^z / sum of e^z and H the entropy:  d logp(label) / dz = 1[label] - p,  dH / dz = -p (log p + H).
    """
    count, width = rows.shape
    out = torch.empty_like(rows)
    peak, total, entropy = reduced
    launch: Any = _gradient
    if count:
        with torch.cuda.device_of(rows):
            launch[(count,)](
                rows,
                labels,
                peak,
                total,
                entropy,
                peak if of_logprob is None else of_logprob,  # one that is not read
                peak if of_entropy is None else of_entropy,
                out,
                width,
                1 / temperature,
                LOGPROB=of_logprob is not None,
                ENTROPY=of_entropy is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out
