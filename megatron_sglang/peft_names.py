"""How peft names the files of an adapter's folder, and the tensors in it. Trainer and engine both know it."""

from __future__ import annotations

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before each module's name."""


def factor_names(module: str) -> tuple[str, str]:
    """Of a module's factors A and B. module: as in Hugging Face weights, e.g. "model.layers.0.self_attn.q_proj"."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
