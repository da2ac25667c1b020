"""Names and shapes of a model from its config.json alone, by transformers, which takes a while to import."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import add_prediction_layer, make_model

from megatron_sglang.errors import DataError
from megatron_sglang.hf_files import prediction_shapes
from megatron_sglang.plan import shapes

pytestmark = pytest.mark.cpu_e2e

TINY = Path(__file__).parents[2] / "examples/tiny_fim/model"

Q30: dict[str, object] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "head_dim": 128},
    **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8},
}
"""Of Qwen3-30B-A3B's config.json."""


def folder_of(config: dict[str, object], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_names_and_shapes_need_no_weights(tmp_path: Path) -> None:
    """transformers keeps a layer's experts in one parameter; the hub's 18,432 names are what both sides speak."""
    found = shapes.hub_shapes(folder_of(Q30, tmp_path))
    assert len(found) == 18867
    assert found["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert found["lm_head.weight"] == (151936, 2048)
    assert shapes.heads(tmp_path) == (32, 4)


def test_shapes_are_checked_against_the_weights_that_are_there(tmp_path: Path) -> None:
    """A config.json of another model would give a plan for nothing."""
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(TINY / "model.safetensors").items()}
    assert shapes.hub_shapes(TINY) == stored
    shutil.copy(TINY / "config.json", tmp_path)
    weights = load_file(TINY / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        DataError, match=r"1 tensors of its safetensors files .* model.norm.weight: absent in the files"
    ):
        shapes.hub_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    with pytest.raises(DataError, match="no readable safetensors header"):
        shapes.hub_shapes(tmp_path)


@pytest.mark.parametrize("model", ["glm4_moe", "deepseek_v3"])
def test_a_layer_for_multi_token_prediction_is_no_part_of_the_plan(model: str, tmp_path: Path) -> None:
    """transformers does not build it, so the hub's own folders were refused as other models than their config.json's.
    Neither the trainer nor the engine has it."""
    without = shapes.hub_shapes(make_model(model, tmp_path))
    assert shapes.hub_shapes(add_prediction_layer(tmp_path)) == without
    assert len(prediction_shapes(tmp_path)) > 40


@pytest.mark.parametrize("config", [{}, {"model_type": "no_such_model"}])
def test_a_folder_that_is_no_model_is_a_data_error(config: dict[str, object], tmp_path: Path) -> None:
    """Not a traceback of transformers."""
    with pytest.raises(DataError, match="has no config"):
        shapes.hub_shapes(tmp_path)
    with pytest.raises(DataError, match="transformers cannot build"):
        shapes.hub_shapes(folder_of(config, tmp_path))
