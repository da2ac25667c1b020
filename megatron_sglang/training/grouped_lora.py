"""Experts and their adapters in a few grouped matrix products, whatever the number of experts.

Transformer Engine multiplies the weights of each expert by themselves, and Megatron-Bridge cuts and joins the tokens of
each adapter: hundreds of launches for a layer of 128 experts, each for a handful of tokens, so a GPU waits for its CPU.
The base is frozen, so that the weights of a rank's experts may lie behind one another in memory, and

    y_e = x_e W_e^T + (alpha/r) (x_e A_e^T) B_e^T        of all experts e of a layer

is three calls of torch's `grouped_mm`, with or without gradients. Shapes: T tokens sorted by expert, E local experts,
I inputs, O outputs, r the rank; `ends` [E] int32 says where each expert's tokens end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.bridge.peft.utils import GroupedExpertLinearAdapter
from torch.nn.functional import grouped_mm

ALIGNED = 8
"""Elements of bf16 in the 16 bytes that each row of a matrix must begin at."""


class PolicyLoRA(LoRA):
    """Bridge's LoRA, whose grouped experts are `GroupedLoRALinear`."""

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> Any:
        made = super().transform(module, name, prefix)
        if type(made) is not LoRALinear or not isinstance(made.adapter, GroupedExpertLinearAdapter):
            return made
        return GroupedLoRALinear(made.to_wrap, made.adapter)


class GroupedLoRALinear(LoRALinear):
    """Bridge's wrapper of one projection of all local experts. What `is_grouped` does not take goes Bridge's way."""

    to_wrap: Any
    adapter: Any

    def __init__(self, to_wrap: Any, adapter: GroupedExpertLinearAdapter) -> None:
        super().__init__(to_wrap, adapter)
        stack(to_wrap)

    def forward(self, x: torch.Tensor, m_splits: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """x: [T, I]. m_splits: [E] tokens of each expert. Gives [T, O], and no bias."""
        if not self.is_grouped(x):
            return super().forward(x, m_splits, *args, **kwargs)
        ends = torch.as_tensor(m_splits).to(x.device, torch.int32, non_blocking=True).cumsum(0, dtype=torch.int32)
        base = stacked(self.to_wrap)
        factors = (self.adapter.linear_in.weight, self.adapter.linear_out.weight) if self._adapter_enabled else None
        return adapted(x, ends, base, factors, self.adapter.alpha / self.adapter.dim), None

    def is_grouped(self, x: torch.Tensor) -> bool:
        """bf16 on a GPU, expert tensor parallel size 1, no bias, dropout or fp8; the base frozen and stacked."""
        return (
            _is_on_gpu(x)
            and x.dtype == torch.bfloat16 == self.to_wrap.weight0.dtype
            and x.is_contiguous()
            and len(x) > 0
            and self._is_plain
            and is_stacked(self.to_wrap)
            and not self.adapter._is_te_fp8_enabled()
        )

    @functools.cached_property
    def _is_plain(self) -> bool:
        base, adapter = self.to_wrap, self.adapter
        weights = weights_of(base)
        factors = adapter.linear_in.weight, adapter.linear_out.weight
        return (
            all(size % ALIGNED == 0 for one in (weights[0], *factors) for size in one.shape[-2:])
            and factors[0].shape[2] == weights[0].shape[1]  # whole: expert tensor parallelism cuts them
            and factors[1].shape[1] == weights[0].shape[0]
            and isinstance(adapter.dropout, torch.nn.Identity)
            and not getattr(base, "use_bias", False)
            and not any(weight.requires_grad for weight in weights)
        )


def adapted(
    x: torch.Tensor,
    ends: torch.Tensor,
    base: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> torch.Tensor:
    """[T, O]. base: [E, O, I]. factors: A [E, r, I] and B [E, O, r]; None: the base alone."""
    out = grouped_mm(x, base.transpose(1, 2), offs=ends)
    if factors is None:
        return out
    down, up = factors
    low = grouped_mm(x, down.transpose(1, 2), offs=ends)
    return out + grouped_mm(low * scale, up.transpose(1, 2), offs=ends)


def weights_of(module: Any) -> list[torch.nn.Parameter]:
    """Weights of Transformer Engine's grouped linear layer, by local expert: each [O, I]."""
    return [getattr(module, f"weight{expert}") for expert in range(module.num_gemms)]


@torch.no_grad()
def stack(module: Any) -> None:
    """Move the weights behind one another into one piece of memory. They stay the parameters they were."""
    weights = weights_of(module)
    together = torch.stack([weight.data for weight in weights])
    for weight, place in zip(weights, together, strict=True):
        weight.data = place


def is_stacked(module: Any) -> bool:
    """Are its weights where `stack` put them? Whoever gives a parameter other memory undoes it."""
    first, last = module.weight0, getattr(module, f"weight{module.num_gemms - 1}")
    apart = (module.num_gemms - 1) * first.numel() * first.element_size()
    return (
        last.data_ptr() - first.data_ptr() == apart
        and last.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def stacked(module: Any) -> torch.Tensor:
    """[E, O, I] over the memory of weights that are stacked."""
    first = module.weight0.data
    return first.as_strided((module.num_gemms, *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def _is_on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda
