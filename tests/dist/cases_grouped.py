"""What a rank of test_grouped_lora.py does with grouped experts, which on a CPU no Megatron layer has."""

from __future__ import annotations

from typing import Any

import torch

EXPERTS, INPUTS, OUTPUTS, RANK = 5, 24, 40, 8
SPLITS = [3, 0, 17, 1, 0]
"""Tokens of each expert; two have none."""


class Base(torch.nn.Module):
    """As Transformer Engine's GroupedLinear: one frozen weight for each expert."""

    num_gemms = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        for expert in range(EXPERTS):
            weight = torch.randn(OUTPUTS, INPUTS).bfloat16()
            self.register_parameter(f"weight{expert}", torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(x.split(m_splits), self.parameters(), strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts]), None


def made() -> Any:
    """A layer of ours around it, with an adapter that changes something."""
    from megatron.bridge.peft.utils import GroupedExpertLinearAdapter
    from megatron.core.model_parallel_config import ModelParallelConfig

    from megatron_sglang.training import grouped_lora

    torch.manual_seed(3)
    adapter = GroupedExpertLinearAdapter(
        INPUTS,
        OUTPUTS,
        RANK,
        num_local_experts=EXPERTS,
        base_linear_name="decoder.layers.0.mlp.experts.linear_fc1",
        activation="identity",
        model_parallel_config=ModelParallelConfig(params_dtype=torch.bfloat16, use_cpu_initialization=True),
        alpha=2 * RANK,
        params_dtype=torch.bfloat16,
    )
    torch.nn.init.normal_(adapter.linear_out.weight)
    return grouped_lora.GroupedLoRALinear(Base(), adapter)


def grouped_like_bridge(enabled: bool) -> dict[str, Any]:
    """Output and gradients of both ways, each against products in fp64."""
    from megatron_sglang.training import grouped_lora

    layer = made()
    if not enabled:
        layer.disable_adapter_layers()
    x = torch.randn(sum(SPLITS), INPUTS).bfloat16()
    upstream = torch.randn(sum(SPLITS), OUTPUTS).bfloat16()
    factors = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
    found: dict[str, Any] = {"taken": []}
    results = {}
    for name, on_gpu in (("ours", True), ("bridge", False)):
        grouped_lora._is_on_gpu = lambda _, on_gpu=on_gpu: on_gpu
        given = x.clone().requires_grad_()
        found["taken"].append(layer.is_grouped(given))
        out, bias = layer(given, SPLITS)
        assert bias is None
        out.backward(upstream)
        results[name] = [out.detach(), given.grad, *(factor.grad for factor in factors if enabled)]
        for factor in factors:
            factor.grad = None
    exact = _exact(layer, x, upstream, enabled)
    for name, tensors in results.items():
        off = [float((one.double() - sure).norm() / sure.norm()) for one, sure in zip(tensors, exact, strict=True)]
        found[name] = off
    if enabled:
        gradients = zip(*(gradient.split(1) for gradient in results["ours"][2:]), SPLITS, strict=True)
        found["of_idle_experts"] = [float(one.abs().sum()) for *both, tokens in gradients for one in both if not tokens]
    return found


def _exact(layer: Any, x: torch.Tensor, upstream: torch.Tensor, enabled: bool) -> list[torch.Tensor]:
    """Output and gradients with respect to input, A and B, in fp64."""
    x = x.double().requires_grad_()
    down, up = (
        factor.detach().double().requires_grad_()
        for factor in (layer.adapter.linear_in.weight, layer.adapter.linear_out.weight)
    )
    parts = []
    for expert, part in enumerate(x.split(SPLITS)):
        base = part @ getattr(layer.to_wrap, f"weight{expert}").double().t()
        parts.append(base + 2.0 * (part @ down[expert].t()) @ up[expert].t() if enabled else base)
    out = torch.cat(parts)
    wanted = [x, down, up] if enabled else [x]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.double())]


def stacked_parameters() -> dict[str, Any]:
    """Stacking keeps parameters and their values; one that is given other memory ends it, and Bridge's way is taken."""
    from megatron_sglang.training import grouped_lora

    grouped_lora._is_on_gpu = lambda _: True
    torch.manual_seed(5)
    base = Base()
    before = [weight.clone() for weight in base.parameters()]
    parameters = list(base.parameters())
    layer = made()
    grouped_lora.stack(base)
    x = torch.randn(sum(SPLITS), INPUTS).bfloat16()
    whole = grouped_lora.stacked(base)
    same = all(torch.equal(one, old) for one, old in zip(base.parameters(), before, strict=True))
    same = same and all(torch.equal(one, old) for one, old in zip(whole, before, strict=True))
    grouped = layer.is_grouped(x)
    weights = grouped_lora.weights_of(layer.to_wrap)
    weights[-1].data = weights[-1].data.clone()
    return {
        "same": same and all(one is two for one, two in zip(base.parameters(), parameters, strict=True)),
        "stacked": grouped_lora.is_stacked(base),
        "grouped": grouped,
        "after_one_moved": layer.is_grouped(x),
        "no_tokens": layer.is_grouped(x[:0]),
        "fp32": layer.is_grouped(x.float()),
    }
