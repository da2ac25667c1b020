"""The trainer's weights under their Hugging Face names, merged. Megatron-Bridge does the naming and the gathering.

Everything here is collective: all ranks iterate together and every rank sees every full tensor. This is the generic
path: right for any model that SGLang and Bridge share, and the oracle for faster ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_sglang import buckets
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weights.merge import MergeStats, Unit, merged, units_of


class MergedWeights:
    """`interfaces.Weights`: merged weights as buckets of at most `bucket_bytes`, checked to be complete.

    expected: HF name -> shape of everything the engine must get (`hf_files.tensor_shapes`); None: not checked.
    merge: False gives the base alone. `stats`: what merging changed in the last version, of this rank's shards.
    """

    def __init__(
        self,
        bridge: Any,
        model_chunks: list[torch.nn.Module],
        bucket_bytes: int,
        dtype: torch.dtype,
        expected: Mapping[str, tuple[int, ...]] | None,
        *,
        merge: bool = True,
    ) -> None:
        self.bridge, self.model_chunks, self.merge = bridge, model_chunks, merge
        self.bucket_bytes, self.dtype, self.expected = bucket_bytes, dtype, expected
        self.stats = MergeStats()

    def buckets(self, version: int) -> Iterator[buckets.Bucket]:
        """Raises `WeightSyncError` for a name that comes twice, is unknown, has another shape, or is missing."""
        self.stats = MergeStats()
        seen: set[str] = set()
        stream = self._checked(version, seen)
        parts = buckets.fill(stream, lambda tensor: tensor.numel() * tensor.element_size(), self.bucket_bytes)
        for index, part in enumerate(parts):
            yield buckets.pack(version, index, part)
        missing = set(self.expected or ()) - seen
        if missing:
            raise WeightSyncError(
                f"version {version}: {len(missing)} tensors of the HF model were not exported, "
                f"{sorted(missing)[0]} first; the bridge has no mapping for them"
            )

    def fidelity(self) -> MergeFidelity:
        """See `interfaces.Weights`."""
        return self.stats.fidelity()

    def _checked(self, version: int, seen: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in the engine's dtype; their names are added to `seen`."""
        for layer in hf_layers(self.bridge, self.model_chunks, self.stats, self.dtype, self.merge):
            for name, tensor in layer:
                if name in seen:
                    raise WeightSyncError(f"version {version}: {name} was exported twice; expected every name once")
                seen.add(name)
                if self.expected is not None and self.expected.get(name) != tuple(tensor.shape):
                    raise WeightSyncError(
                        f"version {version}: {name} was exported with shape {tuple(tensor.shape)}, "
                        f"the HF model has {self.expected.get(name, 'no such tensor')}"
                    )
                yield name, tensor.detach().to(self.dtype)


@torch.no_grad()
def hf_layers(
    bridge: Any,
    model_chunks: list[torch.nn.Module],
    stats: MergeStats | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the full tensors outside the layers, then those of one decoder layer at a time, in `transfer_order`.

    stats: counts what merging changed. dtype: None leaves the model's. merge: False gives the base weights.
    """
    units = units_of(bridge, model_chunks) if merge else []
    for tasks in _by_layer(bridge.get_conversion_tasks(model_chunks)):
        named = exported(bridge, model_chunks, tasks, units, dtype, stats)
        yield sorted(named, key=lambda item: buckets.transfer_order(item[0]))


@torch.no_grad()
def exported(
    bridge: Any,
    model_chunks: list[torch.nn.Module],
    tasks: Sequence[Any],
    units: Sequence[Unit],
    dtype: torch.dtype | None = None,
    stats: MergeStats | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) of Bridge's `tasks`, in Bridge's order, merged where one of `units` has an adapter."""
    prepared = _with_merged(tasks, units, dtype, stats)
    named = bridge.export_hf_weights(
        model_chunks, conversion_tasks=prepared, merge_adapter_weights=False, show_progress=False
    )
    for name, tensor in named:
        yield name.replace(".base_layer.", "."), tensor  # with merging off Bridge marks adapted layers as peft does


def _with_merged(
    tasks: Sequence[Any], units: Sequence[Unit], dtype: torch.dtype | None, stats: MergeStats | None
) -> Iterator[Any]:
    """The tasks, with merged weights in place of those that have an adapter, merged when their turn comes.

    Bridge asks for a task only after it has exported the one before, so a merged shard lives no longer than its export.
    Grouped experts are merged in one go, and their tasks come mixed with others: these live until the last one's.
    """
    by_weight = {id(weight): unit for unit in units if unit.wrapper is not None for weight in unit.bases}
    of_task = [by_weight.get(id(task.param_weight)) if task.param_weight is not None else None for task in tasks]
    left = Counter(unit.names for unit in of_task if unit is not None)
    whole: dict[tuple[str, ...], torch.Tensor] = {}
    for task, unit in zip(tasks, of_task, strict=True):
        if unit is None:
            yield task
            continue
        if unit.names not in whole:
            shares = [1 / unit.replicas] * len(unit.bases)
            whole[unit.names] = merged(unit, dtype or unit.bases[0].dtype, stats, shares)
        weight = whole[unit.names][unit.names.index(task.global_param_name)]
        left[unit.names] -= 1
        if not left[unit.names]:
            del whole[unit.names]
        yield dataclasses.replace(task, param_weight=weight)


def _by_layer(tasks: list[Any]) -> Iterator[list[Any]]:
    """Tasks by decoder layer, those outside the layers first; the same cut on every rank. Bridge sorts them so."""

    def layer(task: Any) -> int:
        found = re.search(r"layers\.(\d+)\.", task.global_param_name)
        return int(found.group(1)) if found else -1

    known = [task for task in tasks if task is not None]  # None: a parameter without a counterpart in the HF model
    for _, of_one_layer in itertools.groupby(sorted(known, key=layer), key=layer):
        yield list(of_one_layer)
