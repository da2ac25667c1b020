"""Many strided copies between one flat buffer and tensors as one Triton kernel, with digests on the way. Needs Triton.

An engine rank writes some thirty rectangles of each layer into its parameters and reads them back: launched one by one
they cost more than their bytes. Words of 8 bytes are moved, since the digest (`digests.py`) is made of those: each is
mixed by its place in its segment of the buffer wherever it lies in a tensor, so that no pass of its own is needed, and
no buffer for what is read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_sglang.copies import Copy
from megatron_sglang.digests import MIX_1, MIX_2

WORD = 8
"""Bytes."""

ROWS, COLS = 32, 32
"""Of the tile that one program moves, in words."""

WARPS = 2
"""Of a program. Small ones are fastest on an H200: one waits for its table and its words while others mix theirs."""

LANES = 64
"""Sums of a segment that programs add to in turn, lest all wait for one address."""

OUTER = 3
"""Axes beside the innermost one that a copy may have."""

VECTOR = 2
"""Words. Where all sizes and places are multiples of it, memory is taken in so large pieces."""


@triton.jit
def _pass(
    addresses,
    table,
    owner,
    flat,
    begins,
    totals,
    copies,
    segments,
    mix_1,
    mix_2,
    BACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = table + tl.load(owner + program).to(tl.int64)
    tensor = tl.load(addresses + tl.load(at)).to(flat.dtype)
    offset = tl.load(at + copies)
    start = tl.load(at + 2 * copies)
    # Divisions of 64 bits would take longer than all the rest; there are never 2^31 rows, or words in one.
    rows = tl.load(at + 3 * copies).to(tl.int32)
    cols = tl.load(at + 4 * copies).to(tl.int32)
    tile = (program - tl.load(at + 5 * copies)).to(tl.int32)
    middle, inner = tl.load(at + 6 * copies).to(tl.int32), tl.load(at + 7 * copies).to(tl.int32)
    stride_0, stride_1, stride_2 = tl.load(at + 8 * copies), tl.load(at + 9 * copies), tl.load(at + 10 * copies)
    flat_0, flat_1, flat_2 = tl.load(at + 11 * copies), tl.load(at + 12 * copies), tl.load(at + 13 * copies)
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
        offset, start, cols = tl.multiple_of(offset, 2), tl.multiple_of(start, 2), tl.multiple_of(cols, 2)
        stride_0, stride_1 = tl.multiple_of(stride_0, 2), tl.multiple_of(stride_1, 2)
        stride_2, flat_0 = tl.multiple_of(stride_2, 2), tl.multiple_of(flat_0, 2)
        flat_1, flat_2 = tl.multiple_of(flat_1, 2), tl.multiple_of(flat_2, 2)
    across = tl.cdiv(cols, COLS)
    left = (tile % across) * COLS
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    col = left + tl.arange(0, COLS)
    in_rows = row < rows
    inside = in_rows[:, None] & (col < cols)[None, :]
    # Rows count through three axes, the last one fastest.
    rest = row // inner
    third, first = (row - rest * inner).to(tl.int64), rest // middle
    second, first = (rest - first * middle).to(tl.int64), first.to(tl.int64)
    there = offset + first * stride_0 + second * stride_1 + third * stride_2
    here = start + first * flat_0 + second * flat_1 + third * flat_2
    of_tensor = tensor + there[:, None] + col[None, :]
    place = here[:, None] + col[None, :]
    if BACK:
        word = tl.load(of_tensor, mask=inside, other=0)
    else:
        word = tl.load(flat + place, mask=inside, other=0)
        tl.store(of_tensor, word, mask=inside)
    # A tile lies within one segment, but for those at the borders.
    lowest = tl.min(tl.where(in_rows, here, 1 << 62)) + left
    highest = tl.max(tl.where(in_rows, here, 0)) + tl.minimum(left + COLS, cols) - 1
    number = tl.arange(0, SEGMENTS)
    ends = tl.load(begins + 1 + number, mask=number < segments, other=1 << 62)
    for segment in range(tl.sum((ends <= lowest).to(tl.int32)), tl.sum((ends <= highest).to(tl.int32)) + 1):
        begin, end = tl.load(begins + segment), tl.load(begins + segment + 1)
        # Of each position what depends on its row, or column, is multiplied once for it.
        position = here - begin + 1
        phase = (position * mix_1)[:, None] + (col.to(tl.int64) * mix_1)[None, :]
        weight = (2 * position + 1)[:, None] + 2 * col[None, :]
        mixed = (word ^ phase) * mix_2
        mixed = (mixed ^ (mixed >> 31)) * weight
        mine = inside & (place >= begin) & (place < end)
        lane = totals + segment * LANES + program % LANES
        tl.atomic_add(lane, tl.sum(tl.sum(tl.where(mine, mixed, 0), 1), 0))


class Moves:
    """Copies that are done together, laid out on the device once.

    lengths: elements of each segment of the flat buffer, one after the other. numbers: name of a tensor -> its place
    among the addresses. itemsize: bytes of an element. `fits` says what can be laid out.
    """

    def __init__(
        self,
        copies: Sequence[Copy],
        lengths: Sequence[int],
        numbers: dict[str, int],
        itemsize: int,
        device: torch.device,
    ) -> None:
        columns, owners, first = [], [], 0
        for copy in copies:
            outer, cols = _shape(copy, WORD // itemsize)
            (_, s0, f0), (middle, s1, f1), (inner, s2, f2) = outer
            rows = math.prod(axis[0] for axis in outer)
            assert max(rows, cols) < 2**31, "the kernel counts rows and their words with 32 bits"
            tiles = triton.cdiv(rows, ROWS) * triton.cdiv(cols, COLS)
            offset, start = copy.offset * itemsize // WORD, copy.flat * itemsize // WORD
            place = (numbers[copy.tensor], offset, start, rows, cols, first)
            columns.append((*place, middle, inner, s0, s1, s2, f0, f1, f2))
            owners.append(tiles)
            first += tiles
        self._copies, self._tiles = len(columns), first
        strided = (1, 2, 4, 8, 9, 10, 11, 12, 13)
        self._aligned = all(column[at] % VECTOR == 0 for column in columns for at in strided)
        self._table = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(device)
        number = torch.arange(len(columns), dtype=torch.int32)
        self._owner = torch.repeat_interleave(number, torch.tensor(owners)).to(device)
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0) * itemsize // WORD
        self._begins = torch.cat([ends.new_zeros(1), ends]).to(device)
        self._lengths = torch.tensor(lengths, dtype=torch.int64).to(device)

    @staticmethod
    def fits(copies: Sequence[Copy], lengths: Sequence[int], itemsize: int) -> bool:
        """Are all copies rows of whole words, with few enough axes, and all segments whole words?"""
        if itemsize > WORD or WORD % itemsize:
            return False
        each = WORD // itemsize
        return all(length % each == 0 for length in lengths) and all(_fits(copy, each) for copy in copies)

    def write(self, flat: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        """From the flat buffer, which begins at a multiple of 16 bytes, into the tensors. addresses: int64 on the
        device, of each tensor's first element, all multiples of 16.

        Returns the digests of the buffer's segments, [segments] int64 on the device; of an empty one 0.
        """
        return self._run(flat.view(torch.int64), addresses, back=False)

    def read(self, addresses: torch.Tensor) -> torch.Tensor:
        """The digests that the segments would have if they were read from the tensors."""
        return self._run(self._table, addresses, back=True)

    def _run(self, flat: torch.Tensor, addresses: torch.Tensor, *, back: bool) -> torch.Tensor:
        totals = torch.zeros((len(self._lengths), LANES), dtype=torch.int64, device=self._lengths.device)
        launch = _pass
        # Triton launches on the current device, and the tensors may lie on another one.
        with torch.cuda.device_of(totals):
            run: Any = launch
            run[(self._tiles,)](
                addresses,
                self._table,
                self._owner,
                flat,
                self._begins,
                totals,
                self._copies,
                len(totals),
                MIX_1,
                MIX_2,
                BACK=back,
                ALIGNED=self._aligned,
                ROWS=ROWS,
                COLS=COLS,
                SEGMENTS=triton.next_power_of_2(len(totals)),
                LANES=LANES,
                num_warps=WARPS,
            )
        return totals.sum(1) + self._lengths


type _Axes = list[tuple[int, int, int]]
"""(count, stride, stride in the flat buffer) of each."""


def _fits(copy: Copy, each: int) -> bool:
    *outer, (cols, stride, flat_stride) = _axes(copy)
    whole = (copy.offset, copy.flat, cols, *(number for axis in outer for number in axis[1:]))
    return (stride, flat_stride) == (1, 1) and len(outer) <= OUTER and all(number % each == 0 for number in whole)


def _axes(copy: Copy) -> _Axes:
    return list(zip(copy.sizes, copy.strides, copy.flat_strides, strict=True))


def _shape(copy: Copy, each: int) -> tuple[_Axes, int]:
    """Outer axes, exactly OUTER, and the innermost run, in words of `each` elements."""
    *outer, (cols, _, _) = _axes(copy)
    axes, cols = [(count, stride // each, flat // each) for count, stride, flat in outer], cols // each
    if cols > COLS and cols % COLS == 0 and len(axes) < OUTER:
        axes, cols = [*axes, (cols // COLS, COLS, COLS)], COLS  # so that a tile is one stretch of memory
    return [(1, 0, 0)] * (OUTER - len(axes)) + axes, cols
