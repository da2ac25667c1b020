"""Models that Megatron runs with Transformer Engine only (DeepSeek-V3's attention, GLM4-MoE's grouped experts), built
without it: their weights are where they are on a GPU, and nothing is computed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import direct as direct_of_cases
from cases import set_up
from cases import shards_of_this_rank as shards_of_cases


def direct(**given: Any) -> dict[str, Any]:
    """`cases.direct` with such a model."""
    _attention_of_two_widths()
    _experts_one_by_one()
    return direct_of_cases(**given)


def shards_of_this_rank(**given: Any) -> tuple[list[list[Any]], int]:
    """`cases.shards_of_this_rank` with such a model."""
    _attention_of_two_widths()
    _experts_one_by_one()
    return shards_of_cases(**given)


def router_bias(hf: str) -> dict[str, Any]:
    """In bf16: is what the generic path sends the bias that this trainer's routers choose by? And is it the file's?"""
    from safetensors.torch import load_file

    from megatron_sglang.weights.export import MergedWeights

    _attention_of_two_widths()
    _experts_one_by_one()
    recipe, model, _, _ = set_up(hf, {}, dtype="bfloat16")
    files = load_file(Path(hf, "model.safetensors"))
    weights = MergedWeights(recipe.bridge, model, 100_000, torch.bfloat16, None)
    sent = [item for bucket in weights.buckets(1) for item in bucket.tensors() if item[0].endswith("correction_bias")]
    routers = [module for module in model[0].modules() if getattr(module, "expert_bias", None) is not None]
    for router in routers:
        router._maintain_float32_expert_bias()  # as each forward begins
    return {
        "sent": len(sent),
        "agree": [torch.equal(t.float(), router.expert_bias) for (_, t), router in zip(sent, routers, strict=True)],
        "rounded": [torch.equal(tensor.float(), files[name].bfloat16().float()) for name, tensor in sent],
        "moves_by": recipe.provider.moe_router_bias_update_rate,
    }


def _attention_of_two_widths() -> None:
    """MLA tells its core attention that keys and values differ in width, which only TE's takes."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__

    def init(self: Any, *given: Any, k_channels: int = 0, v_channels: int = 0, **named: Any) -> None:
        original(self, *given, **named)

    DotProductAttention.__init__ = init


def _experts_one_by_one() -> None:
    """Bridge knows the experts of GLM4-MoE only as TE groups them. The same names, an expert a module."""
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping
    from megatron.bridge.models.glm.glm45_bridge import GLM45Bridge

    original = GLM45Bridge.mapping_registry
    ours, theirs = "decoder.layers.*.mlp.experts.local_experts.*.", "model.layers.*.mlp.experts.*."
    gate, up = theirs + "gate_proj.weight", theirs + "up_proj.weight"

    def registry(self: Any) -> Any:
        more = (
            GatedMLPMapping(megatron_param=ours + "linear_fc1.weight", gate=gate, up=up),
            AutoMapping(megatron_param=ours + "linear_fc2.weight", hf_param=theirs + "down_proj.weight"),
        )
        return MegatronMappingRegistry(*original(self).mappings, *more)

    GLM45Bridge.mapping_registry = registry
