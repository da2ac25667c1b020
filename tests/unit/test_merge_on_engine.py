"""The arithmetic of merging in an engine rank; whole paths are tests/dist/test_methods_dist.py's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sglang.buckets import pack
from megatron_sglang.engine import merge_on_engine
from megatron_sglang.engine.merge_on_engine import Base, Merge
from megatron_sglang.transfer import Box, Place, Region

NAME = "model.layers.0.self_attn.o_proj.weight"
REPLACED = {"aten.mm", "aten.addmm", "aten.bmm", "aten.mean", "aten._log_softmax"}
"""What SGLang's batch-invariant mode (deterministic engines on a GPU) puts Triton kernels in place of; they multiply
fp32 as TF32."""


class Seen(TorchDispatchMode):
    """Names of the operations that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))


def model(weight: torch.Tensor) -> torch.nn.Module:
    found = torch.nn.Module()
    found.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return found


def base_of(weight: torch.Tensor) -> Base:
    slot = Region(0, NAME, Box(0, 0, *weight.shape), Place("weight", 0, weight.shape[1], 1))
    return Base(torch.float32, frozenset({NAME}), {NAME: [slot]}, {"weight": weight}, {})


def test_products_are_not_left_to_kernels_that_sglang_replaces() -> None:
    """On two H200s 99.8 % of the elements of a merged fp32 weight were not the trainer's, because they were."""
    generator = torch.Generator().manual_seed(1)
    weight, up, down = (torch.randn(shape, generator=generator) for shape in ((24, 16), (24, 4), (4, 16)))
    engine = model(torch.zeros_like(weight))
    bucket = pack(1, 0, [("a", down), ("b", up)])
    with Seen() as seen:
        merge_on_engine.merge(engine, Merge(base_of(weight)), bucket, [(NAME, "a", "b")], 2.0)
    assert torch.allclose(engine.weight.double(), weight.double() + 2 * up.double() @ down.double(), atol=1e-5)
    assert "aten.baddbmm" in seen.names
    assert not seen.names & REPLACED


@pytest.mark.parametrize(("off", "is_worse"), [(2**-23, False), (2**-15, True)])
def test_a_sum_that_cancels_is_judged_by_its_terms(off: float, is_worse: bool) -> None:
    """An element of almost nothing may be off by more than itself where its terms are large."""
    weight = torch.ones(8, 8)
    weight[0, 0] = 2**-24
    base = base_of(weight)
    merge_on_engine.keep_witness(model(weight), base)
    weight[0, 0] = -off
    found = merge_on_engine.compare(model(weight), base, 2**-18)
    assert (found["different"], found["elements"]) == (1, 64)
    assert (found["worst"] > 1) is is_worse
