"""Merge, cast, pack and report as one Triton kernel: many rectangles of W + s B A, straight into a flat buffer.

Each weight is read once and each merged element written once, where it will be sent from; no temporaries. Step by step
in torch the same takes about twenty passes over fp32 copies, and twenty launches for every 32 MB. Needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.knobs
import triton.language as tl

from megatron_sglang.weights.factored import Factored

ROWS, COLS = 64, 128
"""Size of the tile that one program merges."""

WARPS = 4
"""Warps of one program."""

LANES = 32
"""Copies of each layer's sums: programs add to them in turn, so that not all of them wait for one address."""

COUNTED = 3
"""What is summed: squares of the update, squares of what the cast lost, elements that the update changed."""

VECTOR = 8
"""If all sizes and places are multiples of so many elements, and all addresses of 16 bytes, memory is read and written
16 bytes at a time."""

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# pointers   [weights, 3] int64: addresses of W, A and B
# table      [10, jobs] int64: the numbers of each job, as `Launch.__init__` lays them out
# numbers    [jobs, 2] float64: scale and share of each job
# owner      [programs] int32: the job that a program works on
# out        flat; its dtype is what W + s B A is rounded to
# sums       [layers, LANES, COUNTED] float64
@triton.jit
def _merge(
    pointers,
    table,
    numbers,
    owner,
    out,
    sums,
    jobs,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(owner + program).to(tl.int64)
    weight = tl.load(table + job)
    top = tl.load(table + jobs + job)
    left = tl.load(table + 2 * jobs + job)
    rows = tl.load(table + 3 * jobs + job)
    cols = tl.load(table + 4 * jobs + job)
    flat = tl.load(table + 5 * jobs + job)
    width = tl.load(table + 6 * jobs + job)
    rank = tl.load(table + 7 * jobs + job)
    layer = tl.load(table + 8 * jobs + job)
    tile = (program - tl.load(table + 9 * jobs + job)).to(tl.int32)  # dividing 64 bits is slow
    scale = tl.load(numbers + 2 * job).to(tl.float32)

    base = tl.load(pointers + 3 * weight).to(tl.pointer_type(WEIGHT))  # pyright: ignore[reportArgumentType]
    down = tl.load(pointers + 3 * weight + 1).to(tl.pointer_type(FACTOR))  # pyright: ignore[reportArgumentType]
    up = tl.load(pointers + 3 * weight + 2).to(tl.pointer_type(FACTOR))  # pyright: ignore[reportArgumentType]
    if ALIGNED:  # then 16 bytes go at a time
        left, cols, flat = tl.multiple_of(left, 8), tl.multiple_of(cols, 8), tl.multiple_of(flat, 8)
        width, rank = tl.multiple_of(width, 8), tl.multiple_of(rank, 8)
        base, down, up = tl.multiple_of(base, 16), tl.multiple_of(down, 16), tl.multiple_of(up, 16)
    across = tl.cdiv(cols, COLS).to(tl.int32)
    row = (tile // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (tile % across) * COLS + tl.arange(0, COLS).to(tl.int64)
    in_rows, in_cols = (row < rows)[:, None], (col < cols)[None, :]
    inside = in_rows & in_cols
    # Most of the bytes: under way while the factors are multiplied.
    before = tl.load(base + (top + row)[:, None] * width + (left + col)[None, :], mask=inside, other=0.0)
    delta = tl.zeros((ROWS, COLS), dtype=tl.float64 if WIDEN else tl.float32)
    for start in range(0, rank, RANKS):
        k = start + tl.arange(0, RANKS).to(tl.int64)
        in_rank = k < rank
        b = tl.load(up + (top + row)[:, None] * rank + k[None, :], mask=in_rows & in_rank[None, :], other=0.0)
        a = tl.load(down + k[:, None] * width + (left + col)[None, :], mask=in_rank[:, None] & in_cols, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float64), b.to(tl.float64)
        delta = tl.dot(b, a, acc=delta, input_precision=PRECISION, out_dtype=delta.dtype)
    delta = delta.to(tl.float32) * scale
    before = before.to(tl.float32)
    whole = before + delta
    cast = whole.to(out.dtype.element_ty)
    tl.store(out + flat + row[:, None] * cols + col[None, :], cast, mask=inside)
    share = tl.load(numbers + 2 * job + 1)
    after = cast.to(tl.float32)
    lost = whole - after
    changed = tl.where(after != before.to(out.dtype.element_ty).to(tl.float32), 1.0, 0.0)
    at = sums + (layer * LANES + tile % LANES) * 3
    tl.atomic_add(at, tl.sum(tl.sum(delta * delta, 1), 0).to(tl.float64) * share)
    tl.atomic_add(at + 1, tl.sum(tl.sum(lost * lost, 1), 0).to(tl.float64) * share)
    tl.atomic_add(at + 2, tl.sum(tl.sum(changed, 1), 0).to(tl.float64) * share)


@dataclass(frozen=True, slots=True)
class Job:
    """Rows [row, row + rows) and columns [col, col + cols) of a merged weight, to be written row by row from element
    `flat` of the destination on."""

    weight: int
    """Number of the weight among those that `Launch.run` is given."""
    row: int
    col: int
    rows: int
    cols: int
    flat: int
    width: int
    """Columns of the whole weight."""
    rank: int
    """Of its adapter."""
    scale: float
    """alpha / r."""
    layer: int
    share: float
    """What its change counts, see `merge.MergeStats`."""


class Launch:
    """Jobs that are done together. What the kernel must know of them is laid out on the device once, and used for each
    weight version."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        tiles = [triton.cdiv(job.rows, ROWS) * triton.cdiv(job.cols, COLS) for job in jobs]
        self.layers = sorted({job.layer for job in jobs})
        elements = [sum(job.rows * job.cols * job.share for job in jobs if job.layer == layer) for layer in self.layers]
        self._elements = torch.tensor(elements, dtype=torch.float64).to(device)
        self._jobs, self._tiles = len(jobs), sum(tiles)
        self._ranks = min(64, triton.next_power_of_2(max(16, *(job.rank for job in jobs))))
        self._aligned = all(
            number % VECTOR == 0 for job in jobs for number in (job.col, job.cols, job.flat, job.width, job.rank)
        )
        first, columns = 0, []
        for job, count in zip(jobs, tiles, strict=True):
            place = (job.weight, job.row, job.col, job.rows, job.cols, job.flat)
            columns.append((*place, job.width, job.rank, self.layers.index(job.layer), first))
            first += count
        self._table = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(device)
        self._numbers = torch.tensor([(job.scale, job.share) for job in jobs], dtype=torch.float64).to(device)
        numbers = torch.arange(len(jobs), dtype=torch.int32)
        self._owner = torch.repeat_interleave(numbers, torch.tensor(tiles)).to(device)

    def run(self, weights: Sequence[Factored], out: torch.Tensor) -> torch.Tensor:
        """Write all jobs into the flat `out`. weights: of the same dtypes; jobs count them through. Returns the sums by
        layer and the layer's elements, each with its share, [layers, COUNTED + 1] float64 on the device."""
        addresses = [address for part in weights for address in _addresses(part)]
        aligned = self._aligned and all(pointer % 16 == 0 for address in addresses for pointer in address)
        # Pinned: else the host would wait for all that this stream was given before.
        pointers = torch.tensor(addresses, dtype=torch.int64, pin_memory=out.is_cuda).to(out.device, non_blocking=True)
        sums = torch.zeros((len(self.layers), LANES, COUNTED), dtype=torch.float64, device=out.device)
        launch: Any = _merge
        # Triton launches on the current device, and the weights may lie on another one.
        with torch.cuda.device_of(out):
            launch[(self._tiles,)](
                pointers,
                self._table,
                self._numbers,
                self._owner,
                out,
                sums,
                self._jobs,
                WEIGHT=_DTYPES[weights[0].bases[0].dtype],
                FACTOR=_DTYPES[weights[0].up.dtype],
                PRECISION="ieee",
                # The interpreter multiplies bfloat16 as if it were an integer, and float32 by numpy, where an element's
                # last bit depends on its place in the tile on some CPUs.
                WIDEN=triton.knobs.runtime.interpret,
                ALIGNED=aligned,
                ROWS=ROWS,
                COLS=COLS,
                RANKS=self._ranks,
                LANES=LANES,
                num_warps=WARPS,
            )
        return torch.cat([sums.sum(1), self._elements[:, None]], 1)


def _addresses(part: Factored) -> list[tuple[int, int, int]]:
    """Addresses of each weight and its two factors, in bytes."""
    down, up = part.down.data_ptr(), part.up.data_ptr()
    down_step, up_step = part.down[0].nbytes, part.up[0].nbytes
    return [
        (base.data_ptr(), down + number * down_step, up + number * up_step) for number, base in enumerate(part.bases)
    ]


def takes(bases: Sequence[torch.Tensor], *factors: torch.Tensor) -> bool:
    """Can the kernel merge weights with these factors?"""
    kinds = {tensor.dtype for tensor in bases}, {tensor.dtype for tensor in factors}
    return all(tensor.is_contiguous() for tensor in (*bases, *factors)) and all(
        len(kind) == 1 and kind <= _DTYPES.keys() for kind in kinds
    )
