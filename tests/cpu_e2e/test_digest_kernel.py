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
from megatron_sglang.digest_kernel import mixed_sum

for count in (1, 7, 4095, 4096, 4097, 30_000):
    words = torch.randint(-(2**62), 2**62, (count,)) * 2 + 1
    found = mixed_sum(words, digests.MIX_1, digests.MIX_2).item()
    assert found == digests._mixed_sum(words, 0).item(), count
print("equal")
"""


def test_the_kernel_computes_the_same() -> None:
    """In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHECK_KERNEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
