"""This rank's adapters: where each sits, what it is called in the Hugging Face model, reading and writing its factors.

Megatron fuses q, k and v (by query group) and gate and up, splits them over TP, and adapts the fused layer. In the
Hugging Face model that is one A that q, k and v share, and for each of them the rows of B that are its own: which rows
is one index for each name (`Site.rows`), used for reading and for writing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import split_qkv_weights
from megatron.core import parallel_state as mpu

from megatron_sglang.errors import DataError
from megatron_sglang.weights.merge import adapted_weights, split_group
from megatron_sglang.weights.peft_format import Factors, join


@dataclass(frozen=True, slots=True)
class Site:
    """The adapter of one linear layer or one expert, the shard of it that this rank holds."""

    layer: str
    """Megatron's name of the decoder layer, counted over the whole model."""
    modules: Mapping[str, str]
    """Part ("q", "k", "v"; "gate", "up"; "" where nothing is fused) -> module name in the Hugging Face model."""
    wrapper: Any
    """Bridge's `AdapterWrapper`."""
    grouped: int | None
    """Which of the experts in one grouped layer; None: the adapter is this one's alone."""

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """Ranks that hold the other shards of both factors; None: there are none. Experts are never split."""
        return split_group(self.wrapper.adapter)

    @property
    def is_first_copy(self) -> bool:
        """True on exactly one of the ranks that have the same factors after `read`; that one sends them."""
        if self.wrapper.adapter.is_expert:
            return mpu.get_expert_data_parallel_rank() == 0
        replica = mpu.get_data_parallel_rank(with_context_parallel=True)
        return replica == 0 and mpu.get_tensor_model_parallel_rank() == 0

    def shapes(self) -> dict[str, tuple[list[int], list[int]]]:
        """Module name -> shapes of what `read` gives. Not collective."""
        down, up = self._shards()
        size = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        down_shape, count = list(down.shape), len(up) * size
        down_shape[self._split_dim] *= size
        rows = self.rows(count)
        return {name: (down_shape, [len(rows[part]), up.shape[1]]) for part, name in self.modules.items()}

    def read(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A [r, in], B [out, r]), whole. Collective over `group`."""
        down, up = self._shards()
        down, up = _gather(down, self.group, self._split_dim), _gather(up, self.group, 0)
        rows = self.rows(len(up))
        return {name: (down, up[rows[part].to(up.device)]) for part, name in self.modules.items()}

    def write(self, parts: Mapping[str, Factors], scale: float) -> None:
        """Set this rank's shard to `parts` joined, at `scale`. Collective over `group`.

        B is 0 for a part that is not given, and in the columns that the parts together do not fill because the model's
        rank is higher. The A of those keeps its values, so that they add nothing now but can be trained.
        """
        down, up = self._shards()
        size = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        rank = 0 if self.group is None else torch.distributed.get_rank(self.group)
        whole_down = _gather(down, self.group, self._split_dim)
        whole_up = up.new_zeros(len(up) * size, up.shape[1])
        rows = self.rows(len(whole_up))
        for part, given in parts.items():
            expected, found = (len(rows[part]), whole_down.shape[1]), (len(given.up), given.down.shape[1])
            if found != expected:
                raise DataError(
                    f"the adapter of {self.modules[part]} is for a weight of shape {found}, the model's is {expected}; "
                    "give the model that the adapter was trained on"
                )
        joined = join(list(parts.values()), scale, up.dtype)
        used = len(joined.down)
        if used > len(whole_up.T):
            raise DataError(
                f"the adapter of {', '.join(self.modules.values())} needs rank {used}, because its parts have "
                f"different A; the model has rank {len(whole_up.T)}, give --lora-rank {used} or more"
            )
        whole_down[:used] = joined.down.to(down)
        whole_up[torch.cat([rows[part] for part in parts]).to(up.device), :used] = joined.up.to(up)
        down.copy_(whole_down.chunk(size, self._split_dim)[rank])
        up.copy_(whole_up.chunk(size)[rank])

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        """Part -> which of the `count` rows of the gathered B are its own, in its own order."""
        every = torch.arange(count)
        names = set(self.modules)
        if names == {""}:
            return {"": every}
        if names == {"q", "k", "v"}:
            split = split_qkv_weights(self.wrapper.to_wrap.config, every[:, None], feature_dim=1)
            return {name: part.flatten() for name, part in zip("qkv", split, strict=True)}
        # Each TP rank holds its part of gate, then its part of up.
        size = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        by_rank = every.view(size, 2, -1)
        return {"gate": by_rank[:, 0].flatten(), "up": by_rank[:, 1].flatten()}

    @property
    def _split_dim(self) -> int:
        """A is split by its input where the layer is row-parallel, else by r; B always by its output."""
        return 1 if self.wrapper.adapter.input_is_parallel else 0

    def _shards(self) -> tuple[torch.Tensor, torch.Tensor]:
        adapter = self.wrapper.adapter
        down, up = adapter.linear_in.weight.data, adapter.linear_out.weight.data
        return (down, up) if self.grouped is None else (down[self.grouped], up[self.grouped])


def find_sites(bridge: Any, model_chunks: list[torch.nn.Module]) -> dict[str, list[Site]]:
    """This rank's adapters by decoder layer, in an order that is the same on the ranks that share them. Collective.

    Raises DataError, maybe on some ranks only: an adapter that cannot be converted by itself.
    """
    adapted = adapted_weights(model_chunks)
    unmapped = set(adapted)
    found: dict[str, list[Site]] = {}
    for task in bridge.get_conversion_tasks(model_chunks):
        if task is None or task.param_weight is None or id(task.param_weight) not in adapted:
            continue
        unmapped.discard(id(task.param_weight))
        layer = re.match(r".*layers\.\d+\.", task.global_param_name)
        assert layer is not None, f"adapter of {task.global_param_name} is outside the decoder layers"
        names = task.mapping.hf_param
        names = {"": names} if isinstance(names, str) else names
        known = set(names) in ({""}, {"q", "k", "v"}, {"gate", "up"})
        if not known or not all(name.endswith(".weight") for name in names.values()):
            raise DataError(
                f"{task.global_param_name} is {sorted(names.values())} in the Hugging Face model, of which an adapter "
                "cannot be converted by itself; write merged weights instead"
            )
        modules = {part: name.removesuffix(".weight") for part, name in names.items()}
        found.setdefault(layer.group(), []).append(Site(layer.group(), modules, *adapted[id(task.param_weight)]))
    if unmapped:  # Bridge warns in a log only; the adapter would be left out
        parameters = (item for chunk in model_chunks for item in chunk.named_parameters())
        first = next(name for name, parameter in parameters if id(parameter) in unmapped)
        raise DataError(
            f"{len(unmapped)} adapted layers of Megatron's model are nothing in the Hugging Face model, {first} first: "
            "Megatron-Bridge does not know them; leave their target out of lora.targets"
        )
    return found


def _gather(shard: torch.Tensor, group: torch.distributed.ProcessGroup | None, dim: int) -> torch.Tensor:
    """The shards of all ranks of `group` one after the other, in memory of its own."""
    if group is None:
        return shard.clone()
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim)
