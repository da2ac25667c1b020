"""Matrix products of float32 on a CPU, summed in float64: trainer and engine then agree to the last digits.

A float32 product of a few hundred terms is off by several units in the last place, and by how many depends on the order
of summation, which differs between Megatron and SGLang, between layouts, and between CPUs. Through a few layers that
grows to 3e-5 in a logprob; with these sums it stays below 1e-5 (docs/log.md), and the demo is the same everywhere.
Registered below autograd, for this process and the children it forks; other dtypes are computed as before.
"""

from __future__ import annotations

import warnings

import torch

_library: torch.library.Library | None = None


def install() -> None:
    """Replace torch's CPU kernels of mm, addmm, bmm and baddbmm. Idempotent."""
    global _library
    if _library is not None:
        return
    _library = library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is the purpose
        for name, kernel in (("mm", _mm), ("addmm", _addmm), ("bmm", _bmm), ("baddbmm", _baddbmm)):
            library.impl(name, kernel, "CPU")


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float64 if they are float32, else in their own dtype. The `out` variants still have torch's kernels."""
    dtype = torch.float64 if a.dtype == torch.float32 else a.dtype
    out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a.to(dtype), b.to(dtype), out=out)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _product(a, b).to(a.dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _product(a, b).to(a.dtype)


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    product = _product(a, b)
    product = product * alpha if alpha != 1 else product
    return (product + beta * bias if beta else product).to(a.dtype)


_baddbmm = _addmm
