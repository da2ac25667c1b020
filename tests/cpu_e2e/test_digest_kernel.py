"""The digest by a Triton kernel, as on a GPU, is the one that torch computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_e2e

CHECK_KERNEL = """
import torch
from megatron_sglang import digests
from megatron_sglang.digest_kernel import mixed_sums

counts = (1, 7, 4095, 4096, 4097, 30_000, 1)
many = [torch.randint(-(2**62), 2**62, (count,)) * 2 + 1 for count in counts]
found = mixed_sums(many, counts, digests.MIX_1, digests.MIX_2)
for count, words, sum_of in zip(counts, many, found.tolist()):
    assert sum_of == digests._mixed_sum(words, 0).item() + count, count
print("equal")
"""


def test_the_kernel_computes_the_same() -> None:
    """In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHECK_KERNEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
