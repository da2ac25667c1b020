"""Products of float32 on a CPU are summed in float64; everything else stays as it was. In a process of its own, because
the kernels stay replaced."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_e2e

CHECK = """
import torch
from megatron_sglang.cpu import exact_matmul

torch.manual_seed(0)
a, b, bias = torch.randn(50, 300) * 9, torch.randn(300, 40) * 9, torch.randn(40)
stack_a, stack_b, stack_c = torch.randn(3, 20, 300) * 9, torch.randn(3, 300, 7) * 9, torch.randn(3, 20, 7)
half = a.bfloat16() @ b.bfloat16()
products = {
    "mm": lambda a, b, bias, sa, sb, sc: a @ b,
    "linear": lambda a, b, bias, sa, sb, sc: torch.nn.functional.linear(a[None], b.t(), bias),
    "vector": lambda a, b, bias, sa, sb, sc: a[:1] @ b,
    "addmm": lambda a, b, bias, sa, sb, sc: torch.addmm(bias, a, b, beta=0.5, alpha=2),
    "bmm": lambda a, b, bias, sa, sb, sc: sa @ sb,
    "baddbmm": lambda a, b, bias, sa, sb, sc: torch.baddbmm(sc, sa, sb, beta=0.0, alpha=0.3),
    "einsum": lambda a, b, bias, sa, sb, sc: torch.einsum("nij,njk->nik", sa, sb),
}
inputs = (a, b, bias, stack_a, stack_b, stack_c)
exact = {name: product(*(x.double() for x in inputs)) for name, product in products.items()}
before = sum(int((product(*inputs) != exact[name].float()).sum()) for name, product in products.items())
exact_matmul.install()
exact_matmul.install()
for name, product in products.items():
    wrong = int((product(*inputs) != exact[name].float()).sum())
    assert wrong <= 1, (name, wrong)  # a sum in float64 is itself rounded, and may fall on the other side
assert before > 1000, before
assert torch.equal(a.bfloat16() @ b.bfloat16(), half)

weight = b.clone().requires_grad_()
(a @ weight).square().sum().backward()
double = b.double().requires_grad_()
(a.double() @ double).square().sum().backward()
assert (weight.grad.double() - double.grad).norm() <= 1e-7 * double.grad.norm()
print("equal")
"""


def test_products_are_correctly_rounded() -> None:
    """Else trainer and engine differ by the order of summation, which the layout decides."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
