"""Many strided copies between tensors and one flat buffer as one Triton kernel. Needs Triton.

An engine rank writes some thirty rectangles of each layer into its parameters and reads them back: launched one by one
they cost more than their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_sglang.copies import Copy

ROWS, COLS = 32, 128
"""Of the tile that one program moves."""

OUTER = 3
"""Axes beside the innermost one that a copy may have."""

RUN = 2048
"""What is one long run is cut into rows of at most so many elements."""

VECTOR = 8
"""Elements. Where all sizes and places are multiples of it, memory is taken in large words."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an element -> what it is moved as: bits, whatever they mean."""


@triton.jit
def _move(
    addresses,
    table,
    owner,
    flat,
    copies,
    BACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = table + tl.load(owner + program).to(tl.int64)
    tensor = tl.load(addresses + tl.load(at)).to(flat.dtype)
    offset = tl.load(at + copies)
    start = tl.load(at + 2 * copies)
    rows = tl.load(at + 3 * copies)
    cols = tl.load(at + 4 * copies)
    tile = program - tl.load(at + 5 * copies)
    middle, inner = tl.load(at + 6 * copies), tl.load(at + 7 * copies)
    stride_0, stride_1, stride_2 = tl.load(at + 8 * copies), tl.load(at + 9 * copies), tl.load(at + 10 * copies)
    flat_0, flat_1, flat_2 = tl.load(at + 11 * copies), tl.load(at + 12 * copies), tl.load(at + 13 * copies)
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
        offset, start, cols = tl.multiple_of(offset, 8), tl.multiple_of(start, 8), tl.multiple_of(cols, 8)
        stride_0, stride_1 = tl.multiple_of(stride_0, 8), tl.multiple_of(stride_1, 8)
        stride_2, flat_0 = tl.multiple_of(stride_2, 8), tl.multiple_of(flat_0, 8)
        flat_1, flat_2 = tl.multiple_of(flat_1, 8), tl.multiple_of(flat_2, 8)
    across = tl.cdiv(cols, COLS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (tile % across) * COLS + tl.arange(0, COLS).to(tl.int64)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    # Rows count through three axes, the last one fastest.
    third, rest = row % inner, row // inner
    second, first = rest % middle, rest // middle
    there = offset + first * stride_0 + second * stride_1 + third * stride_2
    here = start + first * flat_0 + second * flat_1 + third * flat_2
    of_tensor = tensor + there[:, None] + col[None, :]
    of_flat = flat + here[:, None] + col[None, :]
    if BACK:
        tl.store(of_flat, tl.load(of_tensor, mask=inside), mask=inside)
    else:
        tl.store(of_tensor, tl.load(of_flat, mask=inside), mask=inside)


class Moves:
    """Copies that are done together, laid out on the device once.

    numbers: name of a tensor -> its place among the addresses. itemsize: bytes of an element. Raises `ValueError` for a
    copy that `takes` refuses.
    """

    def __init__(self, copies: Sequence[Copy], numbers: dict[str, int], itemsize: int, device: torch.device) -> None:
        self._dtype = _WORDS[itemsize]
        columns, owners, first = [], [], 0
        for copy in copies:
            outer, cols = _shape(copy)
            (_, s0, f0), (middle, s1, f1), (inner, s2, f2) = outer
            rows = math.prod(axis[0] for axis in outer)
            tiles = triton.cdiv(rows, ROWS) * triton.cdiv(cols, COLS)
            place = (numbers[copy.tensor], copy.offset, copy.flat, rows, cols, first)
            columns.append((*place, middle, inner, s0, s1, s2, f0, f1, f2))
            owners.append(tiles)
            first += tiles
        self._copies, self._tiles = len(columns), first
        strided = (1, 2, 4, 8, 9, 10, 11, 12, 13)
        self._aligned = all(column[at] % VECTOR == 0 for column in columns for at in strided)
        self._table = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(device)
        number = torch.arange(len(columns), dtype=torch.int32)
        self._owner = torch.repeat_interleave(number, torch.tensor(owners)).to(device)

    def write(self, flat: torch.Tensor, addresses: torch.Tensor) -> None:
        """From the flat buffer into the tensors. addresses: int64 on the device, of each tensor's first element, all
        multiples of 16."""
        self._run(flat, addresses, back=False)

    def read(self, flat: torch.Tensor, addresses: torch.Tensor) -> None:
        """From the tensors into the flat buffer."""
        self._run(flat, addresses, back=True)

    def _run(self, flat: torch.Tensor, addresses: torch.Tensor, *, back: bool) -> None:
        launch: Any = _move
        # Triton launches on the current device, and the tensors may lie on another one.
        with torch.cuda.device_of(flat):
            launch[(self._tiles,)](
                addresses,
                self._table,
                self._owner,
                flat.view(self._dtype),
                self._copies,
                BACK=back,
                ALIGNED=self._aligned,
                ROWS=ROWS,
                COLS=COLS,
            )


def takes(copy: Copy) -> bool:
    """Has it few enough axes?"""
    axes = list(zip(copy.sizes, copy.strides, copy.flat_strides, strict=True))
    return len(axes) <= OUTER + (axes[-1][1:] == (1, 1))


def _shape(copy: Copy) -> tuple[list[tuple[int, int, int]], int]:
    """Outer axes (count, stride, stride in the flat buffer), exactly OUTER, and the innermost run."""
    if not takes(copy):
        raise ValueError(f"a copy of {copy.tensor} has axes {copy.sizes}; expected at most {OUTER} and an inner run")
    axes, cols = list(zip(copy.sizes, copy.strides, copy.flat_strides, strict=True)), 1
    if axes[-1][1:] == (1, 1):
        cols = axes.pop()[0]
    if not axes and (run := math.gcd(cols, RUN)) >= VECTOR:
        axes, cols = [(cols // run, run, run)], run
    return [(1, 0, 0)] * (OUTER - len(axes)) + axes, cols
