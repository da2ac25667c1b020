"""`digests._mixed_sum` of many tensors as one Triton kernel: one pass over the words, no temporaries. Needs Triton.

A 30B MoE has 400 parameters on an engine rank and an update some 300 segments: launched one by one they would take
longer than to be read. The same pass tells which of them hold NaN or infinity.

Every word costs some twenty instructions on integers, of which an H200 has time for about fifty while it reads one, so
what can be done once for many words is: `benchmarks/digest_speed.py --sweep` tries sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Shape(NamedTuple):
    """Of the work of one program: `blocks` times, its `warps` warps read `reads` times two words in each thread."""

    warps: int
    reads: int
    blocks: int

    @property
    def lanes(self) -> int:
        """Words that a program reads at once."""
        return self.warps * 32 * 2

    @property
    def words(self) -> int:
        """Of a program."""
        return self.lanes * self.reads * self.blocks


SHAPE = Shape(warps=8, reads=4, blocks=8)
"""So that a thread waits for 64 bytes at a time, all that it works on stays in registers, and a total is added to once
for 128 KB."""

LARGE = 16
"""Bytes. Where all addresses are multiples of it, memory is read in so large pieces."""

_EXPONENTS = {
    torch.bfloat16: (0x7F80, 16),
    torch.float16: (0x7C00, 16),
    torch.float32: (0x7F800000, 32),
    torch.float64: (0x7FF0000000000000, 64),
}
"""Bits of the exponent, all of them set in what is not finite, and bits of a number."""


@triton.jit
def _sums(
    table,
    owner,
    totals,
    odd,
    base,
    tensors,
    mix_1,
    mix_2,
    LANES: tl.constexpr,
    READS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOOK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(owner + program).to(tl.int64)
    words = (tl.load(table + number) + base).to(tl.pointer_type(tl.int64))
    if ALIGNED:
        words = tl.multiple_of(words, 16)
    count = tl.load(table + tensors + number)
    start = (program - tl.load(table + 2 * tensors + number)) * (LANES * READS * BLOCKS)
    left = tl.minimum(count - start, LANES * READS * BLOCKS).to(tl.int32)
    exponents = tl.load(table + 4 * tensors + number) if LOOK else 0
    ones = tl.load(table + 5 * tensors + number) if LOOK else 0
    signs = tl.load(table + 6 * tensors + number) if LOOK else 0
    lane = tl.arange(0, LANES)
    # Of position = at + lane + 1 what depends on the lane is multiplied once, not for each word.
    phase = (lane.to(tl.int64) + 1) * mix_1
    weight = 2 * lane.to(tl.int64) + 3
    total, found = tl.zeros([LANES], tl.int64), tl.zeros([LANES], tl.int64)
    blocks = left // (LANES * READS)
    for block in range(blocks):
        for read in tl.static_range(READS):
            at = start + (block * READS + read) * LANES
            word = tl.load(words + at + lane)
            mixed = (word ^ (phase + at * mix_1)) * mix_2
            total += (mixed ^ (mixed >> 31)) * (weight + 2 * at)
            if LOOK:
                # Where all bits of an exponent are set, the difference is 0, and taking 1 away borrows the bit above.
                found |= (((word & exponents) ^ exponents) - ones) & signs
    for rest in range(blocks * READS * LANES, left, LANES):
        at, inside = start + rest, rest + lane < left
        word = tl.load(words + at + lane, mask=inside, other=0)
        mixed = (word ^ (phase + at * mix_1)) * mix_2
        total += tl.where(inside, (mixed ^ (mixed >> 31)) * (weight + 2 * at), 0)
        if LOOK:
            found |= (((word & exponents) ^ exponents) - ones) & signs  # 0 where there is no word
    tl.atomic_add(totals + number, tl.sum(total))
    if LOOK:
        any_found = tl.max((found != 0).to(tl.int32)).to(tl.int64)
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
        self._shape = SHAPE
        layout = _Layout([count for _, count in words], SHAPE.words)
        masks = [_masks(dtype) for dtype in dtypes] if dtypes is not None else [(0, 0, 0)] * len(words)
        rows = [[address for address, _ in words], *layout.rows, list(starts), *map(list, zip(*masks, strict=True))]
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)  # one copy, since each waits for the device
        self._owner, self._mixers, self._look = layout.owner.to(device), mixers, dtypes is not None
        self._aligned = all(address % LARGE == 0 for address, _ in words)

    def run(self, base: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """base: added to each address. Returns [len(words)] int64 sums, and as many numbers of which those are 1 whose
        tensor is not finite, by its dtype; without dtypes the sums again. Both on the device. The sum of no words is
        its start."""
        totals = self._table[3].clone()
        odd = torch.zeros_like(totals) if self._look else totals
        if self._owner.numel():
            self._launch(totals, odd, base)
        return totals, odd

    def _launch(self, totals: torch.Tensor, odd: torch.Tensor, base: int) -> None:
        launch: Any = _sums
        # Triton launches on the current device, and a bucket may lie on another one.
        with torch.cuda.device_of(totals):
            launch[(self._owner.numel(),)](
                self._table,
                self._owner,
                totals,
                odd,
                base,
                len(totals),
                *self._mixers,
                LANES=self._shape.lanes,
                READS=self._shape.reads,
                BLOCKS=self._shape.blocks,
                LOOK=self._look,
                ALIGNED=self._aligned and base % LARGE == 0,
                num_warps=self._shape.warps,
            )


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
    """Which program sums which `each` words of which tensor."""

    def __init__(self, counts: Sequence[int], each: int) -> None:
        programs = [triton.cdiv(count, each) for count in counts]
        firsts = list(itertools.accumulate(programs, initial=0))[:-1]
        self.rows = [list(counts), firsts]
        self.owner = torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32), torch.tensor(programs))


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
