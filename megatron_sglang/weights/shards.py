"""Where the rectangles of each Hugging Face tensor lie in this rank's weights: the trainer's half of the direct path.

Megatron fuses q, k, v (by query group) and gate, up, and splits over TP by rows or columns. How the rows of q, k and v
are mixed is found by sending row numbers through Bridge's own function. A model with a parameter whose mapping is none
of those below goes by the generic path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import split_qkv_weights
from megatron.core import parallel_state as mpu

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.transfer import Box, Place, Region

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Local:
    """One parameter of this rank: its matrix shape, and how many TP ranks split it."""

    name: str
    rows: int
    cols: int
    tp_size: int
    tp_rank: int

    def shard(self, rank: int, hf_name: str, hf_row: int, row: int, rows: int, hf_col: int = 0) -> Region:
        """`rows` of its rows from `row` on, in full width, are those of the HF tensor from (hf_row, hf_col) on."""
        place = Place(self.name, row * self.cols, self.cols, 1)
        return Region(rank, hf_name, Box(hf_row, hf_col, rows, self.cols), place)


def of_this_rank(bridge: Any, model_chunks: list[torch.nn.Module], shapes: Shapes) -> list[Region]:
    """Shards of all parameters of this rank. shapes: HF name -> shape. Collective (Bridge numbers parameters over PP).

    Raises `WeightSyncError` for a parameter whose mapping is not understood.
    """
    rank = torch.distributed.get_rank()
    found: list[Region] = []
    for task in bridge.get_conversion_tasks(model_chunks):
        if task is not None and task.param_weight is not None:
            found += _shards(task, rank, shapes)
    return found


def _shards(task: Any, rank: int, shapes: Shapes) -> Iterator[Region]:
    """Regions of one of Bridge's conversion tasks, i.e. of one parameter of this rank."""
    weight, names = task.param_weight, task.mapping.hf_param
    rows, cols = weight.shape if weight.dim() == 2 else (weight.numel(), 1)
    is_expert = not getattr(weight, "allreduce", True)
    tp_size = 1 if is_expert else mpu.get_tensor_model_parallel_world_size()
    tp_rank = 0 if is_expert else mpu.get_tensor_model_parallel_rank()
    local = _Local(task.global_param_name, rows, cols, tp_size, tp_rank)
    if isinstance(names, str):
        yield _plain(local, rank, names, shapes)
    elif set(names) == {"q", "k", "v"}:
        yield from _qkv(local, rank, names, task.megatron_module.config)
    elif set(names) == {"gate", "up"}:
        half = rows // 2
        for index, part in enumerate(("gate", "up")):
            yield local.shard(rank, names[part], tp_rank * half, index * half, half)
    else:
        raise WeightSyncError(f"{task.global_param_name} maps to {sorted(names)}; the direct path does not know how")


def _plain(local: _Local, rank: int, name: str, shapes: Shapes) -> Region:
    """One HF tensor: whole on each TP rank, or split by rows (the last ranks may hold padding), or by columns."""
    shape = shapes.get(name)
    if shape is None:
        raise WeightSyncError(f"{local.name} is {name} in the HF model, which has no tensor of that name")
    hf_rows, hf_cols = shape if len(shape) == 2 else (shape[0], 1)
    if (local.rows, local.cols) == (hf_rows, hf_cols):
        return local.shard(rank, name, 0, 0, hf_rows)
    if local.cols == hf_cols and local.rows * local.tp_size >= hf_rows:
        first = min(local.tp_rank * local.rows, hf_rows)
        return local.shard(rank, name, first, 0, min(local.rows, hf_rows - first))
    if local.rows == hf_rows and local.cols * local.tp_size == hf_cols:
        return local.shard(rank, name, 0, 0, hf_rows, hf_col=local.tp_rank * local.cols)
    raise WeightSyncError(
        f"{local.name} has {local.rows} x {local.cols} elements on each of {local.tp_size} TP ranks, {name} has "
        f"{shape}; the direct path knows tensors that are whole, or split by rows or columns"
    )


def _qkv(local: _Local, rank: int, names: Mapping[str, str], config: Any) -> Iterator[Region]:
    """A region for each run of rows that are neighbours both in the HF tensor and in this rank's part of the fused one,
    where the query groups follow each other: q, q, k, v, then those of the next group."""
    first = local.tp_rank * local.rows
    every = torch.arange(local.rows * local.tp_size)
    parts = split_qkv_weights(config, every[:, None], feature_dim=1)
    for part, rows in zip("qkv", parts, strict=True):
        mine = [(hf_row, row - first) for hf_row, row in enumerate(rows.flatten().tolist())]
        mine = [(hf_row, row) for hf_row, row in mine if 0 <= row < local.rows]
        start = 0
        for end in range(1, len(mine) + 1):
            if end == len(mine) or mine[end][1] != mine[end - 1][1] + 1 or mine[end][0] != mine[end - 1][0] + 1:
                yield local.shard(rank, names[part], mine[start][0], mine[start][1], end - start)
                start = end
