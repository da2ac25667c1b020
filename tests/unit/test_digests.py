"""One digest, three ways to compute it: in one piece, in chunks without much memory, and by a Triton kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_sglang import digests

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


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_chunks_do_not_change_it(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A digest of 300 MB must not need gigabytes of temporaries."""
    tensor = torch.arange(count, dtype=torch.float32)
    whole = digests.digest(tensor)
    monkeypatch.setattr(digests, "CHUNK_WORDS", 8)
    assert digests.digest(tensor) == whole


def test_many_at_once_are_the_same() -> None:
    """Waiting for a GPU once for each of 500 parameters is slower than reading them."""
    tensors = [torch.randn(size).bfloat16()[1:] for size in (2, 9, 33)]
    assert digests.digests(tensors) == [digests.digest(tensor) for tensor in tensors]


def test_the_kernel_computes_the_same() -> None:
    """In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHECK_KERNEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
