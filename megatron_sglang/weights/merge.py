"""Merge adapters into base weights: W + (alpha/r) B A, in fp32, on the rank that owns the shard, into a temporary.

The base is never written: merging in place and subtracting again drifts in bf16. Megatron-Bridge's own merge at
export gathers first and merges then, with local expert numbers: wrong for SequentialMLP under EP > 1 (bridge 0.6.2,
model_bridge.py:306). Here each rank merges what it holds, so the layout cannot matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model


@dataclass(slots=True)
class MergeStats:
    """What merging changed, summed over the shards of this rank. Squares, each divided by the number of ranks that hold
    the same shard, so that the sum over all ranks is the sum over the model."""

    update: float = 0.0
    """sum of (merged - base)^2, in fp32 before the cast."""
    lost: float = 0.0
    """sum of (cast(merged) - merged)^2: what the engine's dtype cannot hold."""

    def add(self, update: torch.Tensor, lost: torch.Tensor | None, replicas: int) -> None:
        """replicas: how many ranks add this shard."""
        self.update += float(update.square().sum()) / replicas
        if lost is not None:
            self.lost += float(lost.square().sum()) / replicas

    def fidelity(self) -> tuple[float, float]:
        """(L2 norm of the update, share of it lost by the cast), over all ranks. Collective."""
        total = torch.tensor([self.update, self.lost], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        update, lost = total.tolist()
        return math.sqrt(update), math.sqrt(lost / update) if update else 0.0


def adapted_weights(model_chunks: list[torch.nn.Module]) -> dict[int, tuple[AdapterWrapper, int | None]]:
    """id(base weight) -> its adapter, and which of the grouped experts it is (None for a plain linear layer)."""
    found: dict[int, tuple[AdapterWrapper, int | None]] = {}
    for chunk in unwrap_model(model_chunks):
        for module in chunk.modules():
            if not isinstance(module, AdapterWrapper):
                continue
            if hasattr(module.to_wrap, "weight0"):  # TEGroupedLinear: weight0, weight1, ... one for each local expert
                for expert in range(module.to_wrap.num_gemms):
                    found[id(getattr(module.to_wrap, f"weight{expert}"))] = (module, expert)
            else:
                found[id(module.to_wrap.weight)] = (module, None)
    return found


def replicas_of(base: torch.Tensor) -> int:
    """How many ranks hold the same shard of a weight."""
    if getattr(base, "allreduce", True):  # Megatron's mark: False for parameters split over EP
        return mpu.get_data_parallel_world_size(with_context_parallel=True)
    return mpu.get_expert_data_parallel_world_size()


def merged(
    base: torch.Tensor, wrapper: AdapterWrapper, expert: int | None, stats: MergeStats | None, replicas: int
) -> torch.Tensor:
    """The effective weight of one shard, [out, in] as `base`, in `base`'s dtype, in fresh memory.

    stats: where the change is counted (None: it was already); replicas: by how many ranks.

    Collective over the adapter's TP group: both factors are sharded, and each rank needs one of them whole.
    """
    scale = wrapper.adapter.alpha / wrapper.adapter.dim
    down, up = _factors(wrapper.adapter, expert)
    delta = (up @ down).mul_(scale)
    whole = base.detach().float() + delta
    cast = whole.to(base.dtype)
    if stats is not None:
        stats.add(delta, None if cast.dtype == torch.float32 else cast.float() - whole, replicas)
    return cast


def _factors(adapter: Any, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in of the shard] and B [out of the shard, r] in fp32.

    Megatron shards A by r and B by out for a column-parallel layer, A by in and B by out for a row-parallel one.
    """
    down, up = adapter.linear_in.weight.detach().float(), adapter.linear_out.weight.detach().float()
    if expert is not None:
        return down[expert], up[expert]
    group = getattr(adapter, "tp_group", None)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return down, up
    if adapter.input_is_parallel:
        return down, _gather_rows(up, group)
    if not adapter.base_linear_is_parallel:  # the router: every rank has the whole weight
        return _gather_rows(down, group), _gather_rows(up, group)
    return _gather_rows(down, group), up


def _gather_rows(shard: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards)
