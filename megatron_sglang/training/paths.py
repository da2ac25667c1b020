"""The two paths of `sync.py`, put together from the rooms: Megatron's weights on one side, the engine on the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sglang.engine.line import open_line
from megatron_sglang.interfaces import Comm, DirectEngine
from megatron_sglang.sync import DirectPath, GenericPath, plan_for
from megatron_sglang.weights import shards
from megatron_sglang.weights.direct import DirectSender
from megatron_sglang.weights.export import MergedWeights


@dataclass(frozen=True, slots=True)
class Paths:
    """Makes paths for one model and its engine, or its group of engines. Every rank makes the same calls.

    shapes: HF name -> shape of every tensor; None: unknown, so that only the generic path can be had, unchecked.
    engine: on the leader only. engine_ranks: of all engines together.
    """

    comm: Comm
    bridge: Any
    model_chunks: list[Any]
    dtype: torch.dtype
    bucket_bytes: int
    shapes: Mapping[str, tuple[int, ...]] | None
    engine: DirectEngine | None
    engine_ranks: int

    def generic(self) -> GenericPath:
        weights = MergedWeights(self.bridge, self.model_chunks, self.bucket_bytes, self.dtype, self.shapes)
        return GenericPath(self.comm, weights, self.engine)

    def direct(self) -> DirectPath:
        """Makes the plan and installs it in the engine; `WeightSyncError` on all ranks where there is none."""
        shapes = self.shapes or {}
        plan = plan_for(
            self.comm,
            self.engine,
            self.engine_ranks,
            shapes,
            lambda: shards.of_this_rank(self.bridge, self.model_chunks, shapes),
            self.bucket_bytes // self.dtype.itemsize,
        )
        sender = DirectSender(self.bridge, self.model_chunks, plan, self.dtype)
        return DirectPath(self.comm, sender, self.engine, self.engine_ranks, open_line)
