"""`megatron-sglang bench sync` without ranks: the yardstick's payload, and a yardstick that is wrong."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import pytest
import torch

from megatron_sglang.bench import meter, stock, sync
from megatron_sglang.engine import wire

TENSORS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.zeros(())), ("c", torch.ones(5).bfloat16())]


def test_the_payload_is_what_sglang_reads() -> None:
    """By the six attributes that its FlattenedTensorBucket uses (weight_sync/tensor_bucket.py:90)."""
    flat, metadata = stock.flattened(TENSORS)
    text = wire.pickled({"flattened_tensor": flat, "metadata": metadata}, by_handle=False)
    found = pickle.loads(base64.b64decode(text))
    assert found["flattened_tensor"].dtype == torch.uint8
    for (name, tensor), one in zip(TENSORS, found["metadata"], strict=True):
        part = found["flattened_tensor"][one.start_idx : one.end_idx]
        assert (one.name, one.numel) == (name, part.numel())
        assert torch.equal(part.view(one.dtype).reshape(one.shape), tensor)


def held(**parameters: str) -> stock.Held:
    return stock.Held(str(parameters), parameters, 0.1)


def test_our_paths_must_agree_and_the_yardstick_need_not() -> None:
    """A time of a path that leaves other weights means nothing; Bridge's merge may, and is timed all the same."""
    found = sync.Findings()
    sync._compare(2, {"stock": held(w="1", x="0"), "generic": held(w="1", x="2"), "direct": held(w="1", x="2")}, found)
    assert (found.odd, found.parameters) == (["x"], 2)
    with pytest.raises(sync.BenchError, match=r"version 3: .* 1 parameters differ .* x first"):
        sync._compare(3, {"generic": held(w="1", x="2"), "direct": held(w="1", x="3")}, found)


def test_the_99th_of_a_hundred_is_not_the_slowest() -> None:
    numbers: list[Any] = [float(number) for number in range(200)]
    assert meter.spread(numbers)["p99"] == 197.0
