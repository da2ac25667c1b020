"""`digests._mixed_sum` of many tensors as one Triton kernel: one pass over the words, no temporaries. Needs Triton.

A 30B MoE has 400 parameters on an engine rank and an update some 300 segments: launched one by one they would take
longer than to be read. The same pass tells which of them hold NaN or infinity.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words that one program sums."""

_EXPONENTS = {
    torch.bfloat16: (0x7F80, 16),
    torch.float16: (0x7C00, 16),
    torch.float32: (0x7F800000, 32),
    torch.float64: (0x7FF0000000000000, 64),
}
"""Bits of the exponent, all of them set in what is not finite, and bits of a number."""


@triton.jit
def _sums(table, owner, totals, odd, base, tensors, mix_1, mix_2, BLOCK: tl.constexpr, LOOK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(owner + program).to(tl.int64)
    words = (tl.load(table + number) + base).to(tl.pointer_type(tl.int64))
    count = tl.load(table + tensors + number)
    first = tl.load(table + 2 * tensors + number)
    at = (program - first) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < count
    position = at + 1
    word = tl.load(words + at, mask=inside, other=0)
    mixed = (word ^ (position * mix_1)) * mix_2
    mixed = (mixed ^ (mixed >> 31)) * (2 * position + 1)
    tl.atomic_add(totals + number, tl.sum(tl.where(inside, mixed, 0)))
    if LOOK:
        # Where all bits of an exponent are set, the difference is 0, and taking 1 away borrows the bit above them.
        exponents = tl.load(table + 4 * tensors + number)
        ones = tl.load(table + 5 * tensors + number)
        signs = tl.load(table + 6 * tensors + number)
        found = (((word & exponents) ^ exponents) - ones) & signs
        any_found = tl.max(tl.where(inside & (found != 0), 1, 0)).to(tl.int64)
        tl.atomic_max(odd + number, any_found, mask=any_found != 0)


type Words = tuple[int, int]
"""Address in bytes, a multiple of 8, and number of 8-byte words."""


class Sums:
    """Sums over the words of many tensors, laid out on the device once.

    words: of each tensor on `device`, or places in a buffer whose address `run` is told; starts: what each sum begins
    with; mixers: those of `digests.py`; dtypes: of the tensors, where it shall be told which are finite.
    """

    def __init__(
        self,
        words: Sequence[Words],
        starts: Sequence[int],
        mixers: tuple[int, int],
        device: torch.device,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        layout = _Layout([count for _, count in words])
        masks = [_masks(dtype) for dtype in dtypes] if dtypes is not None else [(0, 0, 0)] * len(words)
        rows = [[address for address, _ in words], *layout.rows, list(starts), *map(list, zip(*masks, strict=True))]
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)  # one copy, since each waits for the device
        self._owner, self._mixers, self._look = layout.owner.to(device), mixers, dtypes is not None

    def run(self, base: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """base: added to each address. Returns [len(words)] int64 sums, and as many numbers of which those are 1 whose
        tensor is not finite, by its dtype; without dtypes the sums again. Both on the device. The sum of no words is
        its start."""
        totals = self._table[3].clone()
        odd = torch.zeros_like(totals) if self._look else totals
        if self._owner.numel():
            _launch(self._table, self._owner, totals, odd, base, self._mixers, look=self._look)
        return totals, odd


class Segments:
    """Digests of the parts of a flat buffer, laid out on the device once. lengths: elements of each part, of `itemsize`
    bytes; each part must be whole 8-byte words (`fits`). The sum of an empty part is 0, not its digest."""

    def __init__(self, lengths: Sequence[int], itemsize: int, mixers: tuple[int, int], device: torch.device) -> None:
        sizes = [length * itemsize // 8 for length in lengths]
        places = [8 * end for end in itertools.accumulate(sizes, initial=0)][:-1]
        self._sums = Sums(list(zip(places, sizes, strict=True)), lengths, mixers, device)

    @staticmethod
    def fits(lengths: Sequence[int], itemsize: int) -> bool:
        return all(length * itemsize % 8 == 0 for length in lengths)

    def digests(self, flat: torch.Tensor) -> torch.Tensor:
        """[parts] int64 on the device. flat: contiguous, at an address that is a multiple of 8."""
        return self._sums.run(flat.data_ptr())[0]


class _Layout:
    """Which program sums which block of which tensor."""

    def __init__(self, counts: Sequence[int]) -> None:
        blocks = [triton.cdiv(count, BLOCK) for count in counts]
        first, firsts = 0, []
        for number in blocks:
            firsts.append(first)
            first += number
        self.rows = [list(counts), firsts]
        self.owner = torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), torch.tensor(blocks))


def _masks(dtype: torch.dtype) -> tuple[int, int, int]:
    """Exponents, ones and bits above the exponents, repeated over a word; zeros where every bit pattern is finite."""
    if dtype not in _EXPONENTS:
        return 0, 0, 0
    exponent, bits = _EXPONENTS[dtype]
    ones = sum(1 << at for at in range(0, 64, bits))
    lowest = exponent & -exponent
    return exponent * ones, lowest * ones, _signed(ones << (bits - 1))


def _signed(word: int) -> int:
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


def _launch(
    table: torch.Tensor,
    owner: torch.Tensor,
    totals: torch.Tensor,
    odd: torch.Tensor,
    base: int,
    mixers: tuple[int, int],
    *,
    look: bool,
) -> None:
    launch: Any = _sums
    # Triton launches on the current device, and a bucket may lie on another one.
    with torch.cuda.device_of(totals):
        launch[(owner.numel(),)](table, owner, totals, odd, base, len(totals), *mixers, BLOCK=BLOCK, LOOK=look)
