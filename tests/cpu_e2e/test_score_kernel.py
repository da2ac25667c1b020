"""Logprobs, entropies and their gradient by the Triton kernels, as on a GPU, are what torch makes of the same logits.

In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_e2e

COMMON = """
import math
import torch
from megatron_sglang.training import score_kernel, scores

draw = torch.Generator().manual_seed(7)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Of a gradient in the logits' dtype: its last bit. The interpreter's cast to bfloat16 cuts where a GPU rounds.

def drawn(*shape):
    return torch.randn(*shape, generator=draw)

def close(found, expected, rounding=1e-5):
    # Of fp32 sums in another order. A small number may be the difference of larger ones, hence the second term.
    torch.testing.assert_close(found, expected, rtol=rounding, atol=2e-6, equal_nan=True)

def by(kernel, *arguments, **more):
    scores._is_on_gpu = lambda _: kernel
    return scores.scores(*arguments, **more)

def gradients(kernel, logits, labels, temperature, weights):
    leaf = logits.clone().requires_grad_()
    values = by(kernel, leaf, labels, temperature, entropies=weights[1] is not None)
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True) if weight is not None)
    [gradient] = torch.autograd.grad(loss, [leaf])
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert torch.equal(leaf.detach().nan_to_num(1e9), logits.nan_to_num(1e9)), "the logits were written to"
    return gradient
"""

WHOLE = """
def compare(logits, labels, temperature):
    assert score_kernel.takes(logits)
    found, expected = (by(kernel, logits, labels, temperature, entropies=True) for kernel in (True, False))
    assert found[0].shape == found[1].shape == labels.shape
    assert found[0].dtype == found[1].dtype == torch.float32
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert torch.equal(by(True, logits, labels, temperature, entropies=False)[0].nan_to_num(), found[0].nan_to_num())
    one, other = drawn(labels.shape), drawn(labels.shape)
    for weights in ((one, None), (None, other), (one, other)):
        found, expected = (gradients(kernel, logits, labels, temperature, weights) for kernel in (True, False))
        close(found, expected, ROUNDING[logits.dtype])

for block, width in ((16, 1), (16, 15), (16, 16), (16, 17), (16, 64), (16, 75), (4096, 40), (4096, 9001)):
    score_kernel.BLOCK = block
    for dtype in ROUNDING:
        for temperature in (1.0, 0.7):
            logits = (drawn(2, 3, width) * 4).to(dtype)
            labels = torch.randint(0, width, (2, 3), generator=draw)
            labels[0, 0], labels[1, 2] = -1, width  # another rank's
            compare(logits, labels, temperature)

score_kernel.BLOCK = 16
# The peak comes first, last, and grows with each block; and far apart, where e^z is 0.
steps = torch.arange(75.0).repeat(4, 1)
steps[0], steps[2], steps[3] = steps[0].flip(0), steps[2] * 1e4, -steps[3] * 1e36
compare(steps, torch.tensor([3, 74, 74, 0]), 0.9)
# Words without any probability, a block of them first; NaN and infinity stay in their row.
odd = drawn(6, 75)
odd[0, 30], odd[1, :20], odd[2, 40:], odd[3, 50], odd[4, 5] = -torch.inf, -torch.inf, -torch.inf, torch.nan, torch.inf
labels = torch.tensor([2, 30, 3, 4, 5, 6])
compare(odd, labels, 0.9)
assert by(True, odd, labels, 0.9, entropies=True)[1].isfinite().tolist() == [True] * 3 + [False] * 2 + [True]
# No rows.
compare(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 1.0)
# A gradient of which all elements are one in memory, as that of a sum is.
plain, labels = drawn(2, 3, 40), torch.randint(0, 40, (2, 3), generator=draw)
for kernel in (True, False):
    leaf = plain.clone().requires_grad_()
    by(kernel, leaf, labels, 1.0, entropies=False)[0].sum().backward()
    expected = torch.nn.functional.one_hot(labels, 40) - plain.softmax(-1)
    close(leaf.grad, expected)
# What the kernels do not take.
assert scores._kernel_for(plain) is None
scores._is_on_gpu = lambda _: True
assert scores._kernel_for(plain) is score_kernel
assert scores._kernel_for(plain.double()) is scores._kernel_for(plain[..., :20]) is None
close(by(True, plain[..., :20], labels % 20, 1.0, entropies=True)[1],
      by(True, plain[..., :20].contiguous(), labels % 20, 1.0, entropies=True)[1])
print("equal")
"""

SHARDS = """
# Two ranks by hand. One shard's peak may be far above the other's, or all of its words without probability.
score_kernel.BLOCK = 16
for dtype in ROUNDING:
    logits = drawn(9, 80) * 4
    logits[1, :40] += 30
    logits[2, 40:] += 30
    logits[3, 40:] += 2000
    logits[4, :40] = logits[5, 40:] = -torch.inf
    logits = logits.to(dtype)
    labels = torch.tensor([3, 79, 2, 5, 41, 39, 40, 0, 77])
    halves = [half.contiguous() for half in logits.split(40, 1)]
    temperature, weights = 0.7, (drawn(9), drawn(9))
    locals_ = [labels, labels - 40]
    own = [score_kernel.sums(half, local, temperature, entropies=True) for half, local in zip(halves, locals_)]
    peak = torch.maximum(own[0][0], own[1][0])
    inside = [labels < 40, labels >= 40]
    moved = [scores._rebased(sums, (mine - peak) / temperature, here) for (mine, sums), here in zip(own, inside)]
    label, total, weighted = sum(moved)
    entropy = total.log() - weighted / total
    expected = by(False, logits, labels, temperature, entropies=True)
    close(label - total.log(), expected[0])
    close(entropy, expected[1])
    assert entropy.isfinite().all()
    for half, local, here in zip(halves, locals_, inside):
        of_label = scores._by_torch(half, local, temperature, None, True)[1][0]
        assert (of_label[~here] == 0).all(), "another shard's label counts nothing, also beside -infinity"
    reduced = peak, total, entropy
    for given in ((weights[0], None), (None, weights[1]), weights):
        parts = [score_kernel.gradient(*mine, temperature, reduced, *given) for mine in zip(halves, locals_)]
        close(torch.cat(parts, 1), gradients(False, logits, labels, temperature, given), ROUNDING[dtype])
print("equal")
"""


@pytest.mark.parametrize("program", [WHOLE, SHARDS], ids=["whole", "shards"])
def test_the_kernels_compute_the_same(program: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", COMMON + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
