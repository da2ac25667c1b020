"""Tiny random models of the architectures that SGLang and Megatron-Bridge share, as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "intermediate_size": 128,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1}
_HEADS = {"head_dim": 32}

_DEEPSEEK = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""Fields of DeepSeek's own config.json that SGLang reads and transformers' class does not write."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", _HEADS),
    # 500 words are padded to 512 in the engine; one key/value head is repeated on every rank.
    "qwen3_tied": ("Qwen3Config", _HEADS | {"tie_word_embeddings": True, "vocab_size": 500, "num_key_value_heads": 1}),
    "llama": ("LlamaConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", _HEADS | _MOE | {"num_experts": 8, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeConfig", _HEADS | _MOE | _GROUPS | {"n_group": 1, "use_qk_norm": True}),
    "deepseek_v3": (
        "DeepseekV3Config",
        _MOE
        | _GROUPS
        | {"n_group": 2, "q_lora_rank": 48, "kv_lora_rank": 64, "num_key_value_heads": 4}
        | {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    ),
}
"""Name -> transformers' config class and what differs from `_COMMON`."""


def make_model(name: str, folder: Path) -> Path:
    """Write config.json and model.safetensors (fp32, every tensor random, norms and biases too) into `folder`."""
    import transformers

    kind, changes = MODELS[name]
    config = getattr(transformers, kind)(**(_COMMON | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    biases = [buffer for buffer_name, buffer in model.named_buffers() if "bias" in buffer_name]
    with torch.no_grad():
        for tensor in (*model.parameters(), *biases):
            tensor.normal_()
    model.save_pretrained(folder)
    if name == "deepseek_v3":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | _DEEPSEEK))
    return folder


def add_prediction_layer(folder: Path) -> Path:
    """As the hub has GLM-4.5 and DeepSeek-V3: one more layer than the model has, which predicts a further token and
    has an embedding, a head and a projection of its own; config.json counts it apart."""
    from safetensors.torch import load_file, save_file

    path, weights = folder / "config.json", folder / "model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    last, layer = (f"model.layers.{config['num_hidden_layers'] - by}." for by in (1, 0))
    of_last = {name: tensor for name, tensor in tensors.items() if name.startswith(last)}
    added = {name.replace(last, layer): torch.randn_like(tensor) for name, tensor in of_last.items()}
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    shapes = {"embed_tokens": (vocabulary, hidden), "shared_head.head": (vocabulary, hidden)}
    shapes |= {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,), "shared_head.norm": (hidden,)}
    added |= {f"{layer}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors | added, weights, metadata={"format": "pt"})
    path.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder
