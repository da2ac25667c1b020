"""One digest, whether it is computed in one piece or in chunks, for one tensor or for many."""

from __future__ import annotations

import pytest
import torch

from megatron_sglang import digests


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
