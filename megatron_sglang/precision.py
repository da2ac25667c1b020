"""How exactly numbers are summed and rounded, on both sides of a weight update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32: factors in fp32 would lose 13 of their 23 bits (in bf16 it would not matter)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number of `dtype`, fp32 or bf16, to each of fp64 `values`; of two as near, the even one.

    torch goes to bf16 by fp32, and so rounds twice: what fp32 puts in the middle of two falls to a side by chance. So
    fp32 is given with the last bit set wherever it is not exact, which is in the middle of nothing.
    """
    fp32 = values.to(torch.float32)
    if dtype == torch.float32:
        return fp32
    bits = fp32.view(torch.int32)
    toward_zero = bits - (fp32.double().abs() > values.abs()).int()
    return torch.where(fp32.double() == values, bits, toward_zero | 1).view(torch.float32).to(dtype)
