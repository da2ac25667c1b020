"""What the sync method `adapter` asks of SGLang: its LoRA options, or the reason why it cannot serve these adapters.

lora_server_args(LoraConfig(rank=8, targets=("linear_qkv",)), "folder", "cpu", {})
{"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "k_proj", "v_proj"], ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import ConfigError
from megatron_sglang.hf_files import count_experts

MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's target -> SGLang's."""
KEPT = 2
"""Adapters that stay loaded: the one that serves and the one before it."""
_BACKENDS = {"cpu": "torch_native", "cuda": "triton"}


def lora_server_args(
    lora: LoraConfig, model_path: str, device: Literal["cpu", "cuda"], given: Mapping[str, Any]
) -> dict[str, Any]:
    """ServerArgs beside `given`, the user's own. `ConfigError` where SGLang cannot serve adapters of these targets."""
    if "router" in lora.targets:
        raise ConfigError(
            "sync.method=adapter: SGLang has no adapters for routers; drop router from lora.targets, or use "
            "sync.method=merge-on-engine"
        )
    backend = given.get("lora_backend", _BACKENDS[device])
    config = json.loads(Path(model_path, "config.json").read_text())
    has_experts = count_experts(config) > 0
    experts = [target for target in ("linear_fc1", "linear_fc2") if target in lora.targets]
    if has_experts and experts and backend != "triton":
        raise ConfigError(
            f"sync.method=adapter: SGLang serves adapters of experts by its lora_backend triton only, here it is "
            f"{backend}; drop {' and '.join(experts)} from lora.targets, or use sync.method=merge-on-engine"
        )
    if has_experts and len(experts) == 1:
        raise ConfigError(
            f"sync.method=adapter: SGLang adapts gate, up and down of experts together, lora.targets has only "
            f"{experts[0]}; name linear_fc1 and linear_fc2 both, or neither"
        )
    return {
        "enable_lora": True,
        "max_lora_rank": lora.rank,
        "lora_target_modules": [module for target in lora.targets for module in MODULES[target]],
        "lora_backend": backend,
        "max_loras_per_batch": given.get("max_loras_per_batch", KEPT),
        "max_loaded_loras": given.get("max_loaded_loras", KEPT + 1),
        # What SGLang would skip, `adapters.prove` has refused already; this is for whoever loads others by hand.
        "lora_strict_loading": True,
    }
