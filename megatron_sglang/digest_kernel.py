"""`digests._mixed_sum` as a Triton kernel: one pass over the words, no temporaries. Needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words that one program sums."""


@triton.jit
def _sum(words: Any, count: Any, total: Any, mix_1: Any, mix_2: Any, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < count
    position = at + 1
    mixed = (tl.load(words + at, mask=inside, other=0) ^ (position * mix_1)) * mix_2
    mixed = (mixed ^ (mixed >> 31)) * (2 * position + 1)
    tl.atomic_add(total, tl.sum(tl.where(inside, mixed, 0)))


def mixed_sum(words: torch.Tensor, mix_1: int, mix_2: int) -> torch.Tensor:
    """words: [n] int64; 0-dim int64 on the same device. The mixers are those of `digests.py`."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    grid = (triton.cdiv(words.numel(), BLOCK),)
    launch: Any = _sum
    launch[grid](words, words.numel(), total, mix_1, mix_2, BLOCK=BLOCK)
    return total
