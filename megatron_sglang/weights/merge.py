"""Merge adapters into base weights: W + (alpha/r) B A, in fp32, on the rank that owns the shard, into a temporary.

The base is never written: merging in place and subtracting again drifts in bf16. Megatron-Bridge's own merge at
export gathers first and merges then, with local expert numbers: wrong for SequentialMLP under EP > 1 (bridge 0.6.2,
model_bridge.py:306). Here each rank merges what it holds, so the layout cannot matter.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_sglang.precision import full_precision
from megatron_sglang.transfer import CHUNK_BYTES
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weights.factored import Factored


@dataclass(frozen=True, slots=True)
class Unit:
    """What is merged in one go: a plain weight (one name), or the grouped experts of a layer, which share a wrapper."""

    names: tuple[str, ...]
    """Bridge's global parameter names."""
    bases: tuple[torch.Tensor, ...]
    """[out, in] each, of the same shape."""
    wrapper: Any | None
    """Bridge's `AdapterWrapper`; None: no adapter."""

    @property
    def layer(self) -> int:
        """Decoder layer, counted over the whole model; -1 outside the layers."""
        found = re.search(r"layers\.(\d+)\.", self.names[0])
        return int(found.group(1)) if found else -1

    @property
    def rank(self) -> int:
        """r of its adapter. Read from B, which is split by its rows only, so that each shard has all r columns."""
        assert self.wrapper is not None
        return self.wrapper.adapter.linear_out.weight.shape[-1]

    @property
    def scale(self) -> float:
        """alpha / r of its adapter."""
        assert self.wrapper is not None
        return self.wrapper.adapter.alpha / self.wrapper.adapter.dim

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the weights and, with an adapter, of its factors."""
        factors = () if self.wrapper is None else (self.wrapper.adapter.linear_out.weight,)
        return tuple(tensor.dtype for tensor in (self.bases[0], *factors))

    @property
    def is_collective(self) -> bool:
        """Do the ranks of a TP group have to merge it together?"""
        return self.wrapper is not None and split_group(self.wrapper.adapter) is not None

    @property
    def replicas(self) -> int:
        """How many ranks hold the same shard: those of the data-parallel group, for experts of the expert one."""
        if getattr(self.bases[0], "allreduce", True):  # Megatron's mark: False for parameters split over EP
            return mpu.get_data_parallel_world_size(with_context_parallel=True)
        return mpu.get_expert_data_parallel_world_size()


class MergeStats:
    """What merging changed, summed over the shards of this rank, by decoder layer. Stays on the device until
    `fidelity`.

    Four sums for each layer: |delta|^2, |what the cast lost|^2, elements that changed, elements.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Sequence[int], torch.Tensor]] = []
        """Layers, and the four sums of each. Added up at the end: a bucket must not make the host wait, or launch more
        than it has to."""

    def add(
        self,
        layer: int,
        base: torch.Tensor,
        delta: torch.Tensor,
        whole: torch.Tensor,
        cast: torch.Tensor,
        shares: torch.Tensor,
    ) -> None:
        """base, delta, whole = base + delta: [n, out, in] fp32; cast: `whole` in the engine's dtype. shares [n]: 1 /
        number of ranks that count the same shard, so that the sum over all ranks is the sum over the model."""
        norms = [torch.linalg.vector_norm(part, dim=(1, 2)).double().square() for part in (delta, whole - cast)]
        changed = (cast != base.to(cast.dtype)).sum((1, 2)).double()
        elements = torch.full_like(shares, float(math.prod(delta.shape[1:])))
        found = torch.stack([*norms, changed, elements]) @ shares
        self.add_sums([layer], found[None])

    def add_sums(self, layers: Sequence[int], sums: torch.Tensor) -> None:
        """Add what was summed elsewhere, shares applied: sums [layers, 4] float64 on the device."""
        self._sums.append((layers, sums))

    def fidelity(self) -> MergeFidelity:
        """Over all ranks. Collective."""
        device = torch.cuda.current_device()
        found = [layer for layers, _ in self._sums for layer in layers]
        last = torch.tensor(max(found, default=-1), device=device)
        torch.distributed.all_reduce(last, torch.distributed.ReduceOp.MAX)
        table = torch.zeros(int(last) + 2, 4, dtype=torch.float64, device=device)
        if found:
            rows = [layer % len(table) for layer in found]  # -1, outside the layers, is the last one
            table.index_add_(0, torch.tensor(rows, device=device), torch.cat([sums for _, sums in self._sums]))
        torch.distributed.all_reduce(table)
        *layers, outside = table.tolist()
        return MergeFidelity.of({layer: row for layer, row in enumerate(layers) if row[3]} | {-1: outside})


def units_of(bridge: Any, model_chunks: list[torch.nn.Module]) -> list[Unit]:
    """Everything that this rank holds and the Hugging Face model has, in the bridge's order. Collective."""
    adapted = adapted_weights(model_chunks)
    found: dict[int, list[tuple[int, str, torch.Tensor]]] = {}
    wrappers = {}
    for task in bridge.get_conversion_tasks(model_chunks):
        if task is None or task.param_weight is None:
            continue
        wrapper, expert = adapted.get(id(task.param_weight), (None, None))
        key = id(task.param_weight) if wrapper is None else id(wrapper)
        wrappers[key] = wrapper
        found.setdefault(key, []).append((expert or 0, task.global_param_name, task.param_weight))
    units = []
    for key, members in found.items():
        _, names, weights = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        units.append(Unit(names, weights, wrappers[key]))
    return units


def adapted_weights(model_chunks: list[torch.nn.Module]) -> dict[int, tuple[AdapterWrapper, int | None]]:
    """id(base weight) -> its adapter, and which of the grouped experts it is (None for a plain linear layer)."""
    found: dict[int, tuple[AdapterWrapper, int | None]] = {}
    for chunk in unwrap_model(model_chunks):
        for module in chunk.modules():
            if not isinstance(module, AdapterWrapper):
                continue
            base: Any = module.to_wrap
            if hasattr(base, "weight0"):  # TEGroupedLinear: weight0, weight1, ... one for each local expert
                for expert in range(base.num_gemms):
                    found[id(getattr(base, f"weight{expert}"))] = (module, expert)
            else:
                found[id(base.weight)] = (module, None)
    return found


def merged(
    unit: Unit, dtype: torch.dtype, stats: MergeStats | None, shares: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """The merged weights of a unit, [n, out, in] in `dtype`; fresh memory if it has an adapter.

    stats: where the change is added up; None: it is not counted. shares: of each weight, see `MergeStats.add`; as a
    tensor on the device, torch's way of merging need not wait for a copy of them.
    Collective over the adapter's TP group: both factors are sharded, and each rank needs one of them whole.
    """
    if unit.wrapper is None:
        return unit.bases[0].detach().to(dtype)[None]
    first = unit.bases[0]
    result = torch.empty((len(unit.bases), *first.shape), dtype=dtype, device=first.device)
    factors = factored(unit)
    kernel = kernel_for(unit)
    if kernel is None:
        _merge_by_torch(unit, factors, result, stats, shares)
        return result
    counts = torch.as_tensor(shares, dtype=torch.float64).tolist() if stats is not None else [0.0] * len(unit.bases)
    rows, width = first.shape
    constants = (unit.rank, unit.scale, unit.layer)
    jobs = [
        kernel.Job(weight, 0, 0, rows, width, weight * rows * width, width, *constants, count)
        for weight, count in enumerate(counts)
    ]
    launch = kernel.Launch(jobs, first.device)
    sums = launch.run([factors], result.view(-1))
    if stats is not None:
        stats.add_sums(launch.layers, sums)
    return result


def kernel_for(unit: Unit) -> Any:
    """The module whose kernel merges a unit on its GPU in one pass; None: torch does, step by step."""
    if unit.wrapper is None or not _is_on_gpu(unit.bases[0]):
        return None
    try:
        from megatron_sglang.weights import merge_kernel
    except ImportError:  # no Triton
        return None
    adapter = unit.wrapper.adapter
    return merge_kernel if merge_kernel.takes(unit.bases, adapter.linear_in.weight, adapter.linear_out.weight) else None


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    """By itself so that tests can run the kernel on a CPU, by Triton's interpreter."""
    return tensor.is_cuda


def _merge_by_torch(
    unit: Unit,
    factors: Factored,
    result: torch.Tensor,
    stats: MergeStats | None,
    shares: Sequence[float] | torch.Tensor,
) -> None:
    """Fill `result` [n, out, in], so many weights at a time that an fp32 temporary stays within `CHUNK_BYTES`."""
    weights = torch.as_tensor(shares, dtype=torch.float64, device=result.device)
    step = max(1, CHUNK_BYTES // (unit.bases[0].numel() * 4))
    for start in range(0, len(unit.bases), step):
        some = slice(start, start + step)
        base = torch.stack(factors.bases[some]).float()
        with full_precision():
            delta = torch.bmm(factors.up[some].float(), factors.down[some].float()).mul_(unit.scale)
        whole = base + delta
        result[some] = whole
        if stats is not None:
            stats.add(unit.layer, base, delta, whole, result[some], weights[some])


@contextlib.contextmanager
def in_place(bridge: Any, model_chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, the model computes what the engine serves: adapters are merged into the weights, in the weights' own
    dtype, and switched off. Afterwards the untouched base is back. Needs memory for a second copy of the adapted
    weights. Collective."""
    units = [unit for unit in units_of(bridge, model_chunks) if unit.wrapper is not None]
    before = [(base, base.data) for unit in units for base in unit.bases]
    wrappers: Any = {id(unit.wrapper): unit.wrapper for unit in units}
    try:
        with torch.no_grad():
            for unit in units:
                for base, whole in zip(unit.bases, merged(unit, unit.bases[0].dtype, None, ()), strict=True):
                    base.data = whole
        for wrapper in wrappers.values():
            wrapper.disable_adapter_layers()
        yield
    finally:
        for base, data in before:
            base.data = data
        for wrapper in wrappers.values():
            wrapper.enable_adapter_layers()


def factored(unit: Unit) -> Factored:
    """What a unit with an adapter is merged from. Collective over the adapter's TP group.

    Megatron shards A by r and B by out for a column-parallel layer, A by in and B by out for a row-parallel one.
    """
    assert unit.wrapper is not None
    adapter = unit.wrapper.adapter
    bases = tuple(weight.detach() for weight in unit.bases)
    down, up = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    if down.dim() == 3:
        return Factored(bases, down, up)
    group = split_group(adapter)
    if group is not None and adapter.input_is_parallel:
        up = _gather_rows(up, group)
    elif group is not None:
        down = _gather_rows(down, group)
        if not adapter.base_linear_is_parallel:  # the router: every rank has the whole weight
            up = _gather_rows(up, group)
    return Factored(bases, down[None], up[None])


def split_group(adapter: Any) -> torch.distributed.ProcessGroup | None:
    """Ranks that hold the other shards of its factors; None: there are none. Experts are never split."""
    group = getattr(adapter, "tp_group", None)
    return None if group is None or torch.distributed.get_world_size(group) == 1 else group


def _gather_rows(shard: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards)
