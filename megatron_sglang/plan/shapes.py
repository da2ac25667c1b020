"""Names and shapes of a model's Hugging Face tensors, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sglang.errors import DataError
from megatron_sglang.hf_files import tensor_shapes

Shapes = dict[str, tuple[int, ...]]


def hub_shapes(folder: Path) -> Shapes:
    """HF name -> shape of every tensor of the model in `folder`, as on the hub.

    Built on meta by transformers, whose own table for saving turns its parameters into the hub's tensors (it keeps the
    experts of a layer in one, the hub has three for each). A tied head is not among them. Where safetensors files are
    there, their headers must say the same. Raises `DataError` for a folder that cannot be read or does not agree.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no config.json; give a folder in Hugging Face format (weights are not needed)")
    built = _built(folder)
    if stored := tensor_shapes(folder):
        odd = sorted(name for name in built.keys() | stored.keys() if built.get(name) != stored.get(name))
        if odd:
            raise DataError(
                f"{folder}: {len(odd)} tensors of its safetensors files are not those of its config.json, first "
                f"{odd[0]}: {stored.get(odd[0], 'absent')} in the files, {built.get(odd[0], 'absent')} by config.json; "
                "fetch the folder again, or remove the weights to plan from config.json"
            )
    return built


def heads(folder: Path) -> tuple[int, int]:
    """Attention heads and key-value heads of the model, from config.json."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        query = int(config["num_attention_heads"])
        return query, int(config.get("num_key_value_heads") or query)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder}/config.json: num_attention_heads cannot be read ({type(error).__name__}: {error}); "
            "expected a transformer's config.json"
        ) from error


def experts_per_token(folder: Path) -> int:
    """Of a model with experts, from config.json; else 0."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config).get("num_experts_per_tok") or 0)


def _built(folder: Path) -> Shapes:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(
            f"transformers cannot build the model of {folder}: {type(error).__name__}: {error}; expected a causal "
            "language model that it knows (code from a checkpoint is never run)"
        ) from error
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dict(first.values())).items()}
