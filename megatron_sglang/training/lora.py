"""LoRA on a Megatron model (Hu et al. 2021, arXiv 2106.09685): W + (alpha/r) B A, one adapter for each expert.

Which adapter is whose follows from where it sits, not from the rank that holds it: A is drawn from a generator
seeded by (layer, expert, module), as a whole, and every rank keeps its slice. So a run starts from the same
adapters under any TP, PP, EP; B is zero, so the adapted model starts as the base.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_sglang.config import LoraConfig
from megatron_sglang.training.grouped_lora import PolicyLoRA


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapted linear layer and its place in the whole model (`expert` is None outside MoE layers)."""

    wrapper: Any
    """Bridge's `AdapterWrapper`."""
    layer: int
    expert: int | None
    module: str

    @property
    def scale(self) -> float:
        return self.wrapper.adapter.alpha / self.wrapper.adapter.dim


def apply(model: torch.nn.Module, config: LoraConfig, seed: int) -> torch.nn.Module:
    """Freeze `model` and adapt the layers of `config.targets`; the adapters are the only parameters that train."""
    peft = PolicyLoRA(
        target_modules=list(config.targets),
        dim=config.rank,
        alpha=config.alpha,  # type: ignore[arg-type]
        share_expert_adapters=False,
    )
    model = peft(model, training=True)
    for adapter in adapters([model]):
        _init_in_place(adapter, seed)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # where the experts' weights lay before they were stacked: nearly all of the model
    return model


def adapters(model_chunks: list[torch.nn.Module]) -> Iterator[Adapter]:
    """All adapters of this rank. Grouped experts (one module for all local experts) come as their first expert."""
    for chunk in unwrap_model(model_chunks):
        layers = {
            name: module.layer_number
            for name, module in chunk.named_modules()
            if re.search(r"layers\.\d+$", name) and hasattr(module, "layer_number")
        }
        for name, module in chunk.named_modules():
            if isinstance(module, AdapterWrapper):
                layer_name = re.match(r".*layers\.\d+", name)
                assert layer_name is not None, f"adapter {name} is outside the decoder layers"
                yield Adapter(module, layers[layer_name.group()], _global_expert(name, module), name.split(".")[-1])


def _global_expert(name: str, wrapper: Any) -> int | None:
    if ".experts." not in name:
        return None
    per_rank = wrapper.to_wrap.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    local = re.search(r"local_experts\.(\d+)", name)
    return mpu.get_expert_model_parallel_rank() * per_rank + (int(local.group(1)) if local else 0)


def _init_in_place(adapter: Adapter, seed: int) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), the Kaiming-uniform choice of the LoRA paper's code; B = 0."""
    inner = adapter.wrapper.adapter
    weight = inner.linear_in.weight
    inner.linear_out.weight.data.zero_()
    if weight.dim() == 3:  # grouped experts: [local experts, r, in]
        for local, one in enumerate(weight.data.unbind()):
            assert adapter.expert is not None
            one.copy_(_draw(list(one.shape), (seed, adapter.layer, adapter.expert + local, adapter.module)))
        return
    expert_parallel = adapter.expert is not None
    tp_size = 1 if expert_parallel else mpu.get_tensor_model_parallel_world_size()
    tp_rank = 0 if expert_parallel else mpu.get_tensor_model_parallel_rank()
    split_dim = 1 if inner.input_is_parallel else 0
    shape = list(weight.shape)
    shape[split_dim] *= tp_size
    whole = _draw(shape, (seed, adapter.layer, adapter.expert, adapter.module))
    weight.data.copy_(whole.chunk(tp_size, split_dim)[tp_rank])


def _draw(shape: list[int], key: tuple[object, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


@contextmanager
def disabled(model_chunks: list[torch.nn.Module]) -> Iterator[None]:
    """The reference policy: the same model without its adapters."""
    wrappers: list[Any] = [adapter.wrapper for adapter in adapters(model_chunks)]
    for wrapper in wrappers:
        wrapper.disable_adapter_layers()
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.enable_adapter_layers()


def vary(model_chunks: list[torch.nn.Module], version: int) -> None:
    """Other values in each version and each adapter, for measuring; the same on ranks that hold copies."""
    for adapter in adapters(model_chunks):
        shard = 0 if adapter.expert is not None else mpu.get_tensor_model_parallel_rank()
        for name, parameter in adapter.wrapper.adapter.named_parameters():
            key = f"{version} {adapter.layer} {adapter.expert} {adapter.module} {shard} {name}"
            generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(key.encode()))
            values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.data.copy_(values * 0.02)
