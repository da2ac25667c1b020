"""`digests._mixed_sum` of many tensors as one Triton kernel: one pass over the words, no temporaries. Needs Triton.

A 30B MoE has 400 parameters on an engine rank and an update some 300 segments: launched one by one they would take
longer than to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words that one program sums."""


@triton.jit
def _sums(table, owner, totals, tensors, mix_1, mix_2, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(owner + program)
    words = tl.load(table + number).to(tl.pointer_type(tl.int64))
    count = tl.load(table + tensors + number)
    first = tl.load(table + 2 * tensors + number)
    at = (program - first) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < count
    position = at + 1
    mixed = (tl.load(words + at, mask=inside, other=0) ^ (position * mix_1)) * mix_2
    mixed = (mixed ^ (mixed >> 31)) * (2 * position + 1)
    tl.atomic_add(totals + number, tl.sum(tl.where(inside, mixed, 0)))


def mixed_sums(words: Sequence[torch.Tensor], starts: Sequence[int], mix_1: int, mix_2: int) -> torch.Tensor:
    """words: [n] int64 each, n > 0, all of one device; starts: what each sum begins with. [len(words)] int64 on that
    device. The mixers are those of `digests.py`."""
    device = words[0].device
    blocks = [triton.cdiv(part.numel(), BLOCK) for part in words]
    firsts = [sum(blocks[:number]) for number in range(len(blocks))]
    rows = [[part.data_ptr() for part in words], [part.numel() for part in words], firsts, list(starts), blocks]
    table = torch.tensor(rows, dtype=torch.int64).to(device)  # one copy, since each waits for the device
    totals = table[3].clone()
    numbers = torch.arange(len(words), device=device)
    owner = torch.repeat_interleave(numbers, table[4], output_size=sum(blocks))
    launch: Any = _sums
    # Triton launches on the current device, and a bucket may lie on another one.
    with torch.cuda.device_of(words[0]):
        launch[(sum(blocks),)](table, owner, totals, len(words), mix_1, mix_2, BLOCK=BLOCK)
    return totals
