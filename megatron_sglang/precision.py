"""How exactly fp32 products are summed, on both sides of a weight update."""

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
