"""The trainer's weights under their Hugging Face names, merged. Megatron-Bridge does the naming and the gathering.

Everything here is collective: all ranks iterate together and every rank sees every full tensor. This is the generic
path: right for any model that SGLang and Bridge share, and the oracle for faster ones.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_sglang import buckets
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.weights.merge import MergeStats, adapted_weights, merged


class MergedWeights:
    """`interfaces.Weights`: merged weights as buckets of at most `bucket_bytes`, checked to be complete.

    expected: HF name -> shape of everything the engine must get (`hf_shapes`); None: not checked against a folder.
    stats: what merging changed in the last version, of this rank's shards.
    """

    def __init__(
        self,
        bridge: Any,
        model_chunks: list[torch.nn.Module],
        bucket_bytes: int,
        dtype: torch.dtype,
        expected: Mapping[str, tuple[int, ...]] | None,
    ) -> None:
        self.bridge, self.model_chunks = bridge, model_chunks
        self.bucket_bytes, self.dtype, self.expected = bucket_bytes, dtype, expected
        self.stats = MergeStats()

    def buckets(self, version: int) -> Iterator[buckets.Bucket]:
        """Raises `WeightSyncError` for a name that comes twice, is unknown, has another shape, or is missing."""
        self.stats = MergeStats()
        seen: set[str] = set()
        index = 0
        for layer in hf_layers(self.bridge, self.model_chunks, self.stats):
            named = [(name, tensor.detach().to(self.dtype)) for name, tensor in layer]
            for name, tensor in named:
                self._check(version, name, tensor, seen)
            sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in named}
            for part in buckets.fill(named, sizes, self.bucket_bytes):
                yield buckets.pack(version, index, part)
                index += 1
        missing = set(self.expected or ()) - seen
        if missing:
            raise WeightSyncError(
                f"version {version}: {len(missing)} tensors of the HF model were not exported, "
                f"{sorted(missing)[0]} first; the bridge has no mapping for them"
            )

    def fidelity(self) -> tuple[float, float]:
        """(L2 norm of the update, share of it lost by the cast), over all ranks."""
        device = torch.cuda.current_device()
        total = torch.tensor([self.stats.update, self.stats.lost], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        update, lost = total.tolist()
        return math.sqrt(update), math.sqrt(lost / update) if update else 0.0

    def _check(self, version: int, name: str, tensor: torch.Tensor, seen: set[str]) -> None:
        if name in seen:
            raise WeightSyncError(f"version {version}: {name} was exported twice; expected every name once")
        seen.add(name)
        if self.expected is not None and self.expected.get(name) != tuple(tensor.shape):
            raise WeightSyncError(
                f"version {version}: {name} was exported with shape {tuple(tensor.shape)}, "
                f"the HF model has {self.expected.get(name, 'no such tensor')}"
            )


def hf_shapes(hf_path: str) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor in a folder's safetensors files; reads headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(hf_path).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@torch.no_grad()
def hf_layers(
    bridge: Any, model_chunks: list[torch.nn.Module], stats: MergeStats, merge: bool = True
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the full tensors of one decoder layer (or of one tensor outside the layers) at a time, fused ones adjacent.

    The order is the same whatever the layout. merge: False gives the base weights.
    """
    adapted = adapted_weights(model_chunks) if merge else {}
    for tasks in _by_layer(bridge.get_conversion_tasks(model_chunks)):
        prepared = []
        for task in tasks:
            found = adapted.get(id(task.param_weight)) if task.param_weight is not None else None
            if found is not None:
                task = dataclasses.replace(task, param_weight=merged(task.param_weight, *found, stats))
            prepared.append(task)
        exported = bridge.export_hf_weights(
            model_chunks, conversion_tasks=prepared, merge_adapter_weights=False, show_progress=False
        )
        # With merging off Bridge marks adapted layers as peft does.
        named = [(name.replace(".base_layer.", "."), tensor) for name, tensor in exported]
        yield sorted(named, key=lambda item: (buckets.fusion_key(item[0]), item[0]))


def _by_layer(tasks: list[Any]) -> Iterator[list[Any]]:
    """Consecutive tasks of the same decoder layer together; the same cut on every rank."""
    batch: list[Any] = []
    current = None
    for task in tasks:
        if task is None:  # a parameter without a counterpart in the HF model
            continue
        layer = re.match(r".*layers\.\d+\.", task.global_param_name)
        key = layer.group() if layer else task.global_param_name
        if batch and key != current:
            yield batch
            batch = []
        current = key
        batch.append(task)
    if batch:
        yield batch
