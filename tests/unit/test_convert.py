"""The converter's pure parts: PEFT's file format, fused factors, output folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_sglang.errors import DataError
from megatron_sglang.weights import write
from megatron_sglang.weights.peft_format import CONFIG, WEIGHTS, AdapterFolder, Factors, join, write_adapter

ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


def factors(modules: list[str], rank: int = 2, size: int = 6) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (torch.randn(rank, size), torch.randn(size, rank)) for name in modules}


def adapter(folder: Path, modules: list[str], **config: Any) -> Path:
    """An adapter folder with other options than we write."""
    write_adapter(folder, factors(modules), rank=2, alpha=4, base="base")
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    return folder


@settings(deadline=None, max_examples=50)
@given(
    shared=st.integers(0, 3),
    own=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    scales=st.sampled_from([1.0, 4.0]),
)
def test_joined_factors_make_the_same_deltas(shared: int, own: list[int], scales: float) -> None:
    """A fused layer whose parts were joined wrongly trains on from another model; and parts that share rows of A must
    not need the rank of all of them."""
    if shared + min(own) == 0:
        own = [rank + 1 for rank in own]
    common = torch.randn(shared, 5)
    parts = []
    for index, rank in enumerate(own):
        down = torch.cat([torch.randn(rank, 5), common])
        parts.append(Factors(down, torch.randn(index + 2, rank + shared), scales if index else 2.0))
    joined = join(parts, scale=2.0)
    assert len(joined.down) == shared + sum(own)
    expected = torch.cat([part.scale * part.up @ part.down for part in parts])
    torch.testing.assert_close(joined.scale * joined.up @ joined.down, expected)


def test_rows_that_repeat_within_a_part_are_added() -> None:
    """peft doubles the rank of gate_up_proj; with gate and up sharing A, half of it is a repetition."""
    down = torch.randn(2, 4)
    gate, up = torch.randn(3, 2), torch.randn(3, 2)
    stacked = Factors(torch.cat([down, down]), torch.block_diag(gate, up))
    joined = join([stacked], scale=1.0)
    assert torch.equal(joined.down, down)
    assert torch.equal(joined.up, torch.cat([gate, up]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Names, tensors, scale and the rank that Megatron needs, which is three times r where q, k and v differ."""
    given = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in factors(ATTENTION).items()}
    write_adapter(tmp_path, given, rank=2, alpha=4, base="base")
    folder = AdapterFolder(tmp_path, experts=0)
    assert sorted(folder.modules) == sorted(ATTENTION)
    for name, (down, up) in given.items():
        found = folder.factors(name)
        assert found is not None
        assert torch.equal(found.down, down)
        assert torch.equal(found.up, up)
        assert found.scale == 2.0
    assert folder.factors("model.layers.1.self_attn.q_proj") is None
    lora = folder.lora_config(None)
    assert (lora.rank, lora.alpha, lora.targets) == (6, 12.0, ("linear_qkv", "linear_proj"))
    with pytest.raises(DataError, match="--lora-rank 4 is below 6"):
        folder.lora_config(4)


def test_each_module_has_the_scale_that_peft_gives_it(tmp_path: Path) -> None:
    """alpha_pattern and rank-stabilised LoRA: a factor that is ignored is a wrong model."""
    config = {"alpha_pattern": {r"self_attn\.v_proj": 8}, "use_rslora": True}
    folder = AdapterFolder(adapter(tmp_path, ATTENTION, **config), experts=0)
    scales = {name[-6]: found.scale for name in ATTENTION if (found := folder.factors(name))}
    assert scales == pytest.approx({"q": 4 / 2**0.5, "k": 4 / 2**0.5, "v": 8 / 2**0.5, "o": 4 / 2**0.5})


def test_dense_layers_beside_experts_are_named_as_parameters(tmp_path: Path) -> None:
    """peft takes gate_proj, up_proj and down_proj for the experts alone and would leave dense and shared layers out."""
    names = ["gate_proj", "up_proj", "down_proj"]
    modules = [f"model.layers.1.mlp.experts.{expert}.{name}" for expert in range(2) for name in names]
    dense = [f"model.layers.0.mlp.{name}" for name in names]
    write_adapter(tmp_path, factors([*modules, *dense, *ATTENTION]), rank=2, alpha=4, base="")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_parameters"] == [f"{name}.weight" for name in dense]
    write_adapter(tmp_path, factors(dense), rank=2, alpha=4, base="")
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(names)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora=True has no counterpart"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    """Read as plain LoRA they would load, and be another model."""
    with pytest.raises(DataError, match=text):
        AdapterFolder(adapter(tmp_path, ATTENTION, **config), experts=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"), "lora_B"),
        (
            lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(1)}),
            "no factor of a linear layer",
        ),
        (lambda state: state.update({"base_model.model.x.experts.lora_B.weight": torch.zeros(4, 3)}), "2 experts"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    """Half an adapter, or one of a model with other experts."""
    state = load_file(adapter(tmp_path, ATTENTION) / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=text):
        AdapterFolder(tmp_path, experts=2)


def test_a_module_without_a_place_in_megatron_is_refused(tmp_path: Path) -> None:
    """An adapter of lm_head would be dropped in silence."""
    folder = AdapterFolder(adapter(tmp_path, [*ATTENTION, "lm_head"]), experts=0)
    with pytest.raises(DataError, match="lm_head, for which"):
        folder.lora_config(None)


def test_shards_stay_within_their_size_and_the_index_finds_all(tmp_path: Path) -> None:
    """Tensors that are views of others, and one that is larger than a shard."""
    whole = torch.randn(4, 100)
    named = {f"row{index}": whole[index] for index in range(4)} | {"turned": whole.T, "small": torch.zeros(3)}
    writer = write.ShardWriter(tmp_path, shard_bytes=900)
    writer.extend(named.items())
    writer.close()
    index = json.loads((tmp_path / write.INDEX).read_text())
    assert index["metadata"]["total_size"] == 8 * 400 + 12
    found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.iterdir())) == 1 + 4
    assert (tmp_path / "model-00001-of-00004.safetensors").stat().st_mode & 0o444 == tmp_path.stat().st_mode & 0o444


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Half a model is loaded without complaint when its config.json is there."""
    target = tmp_path / "deep" / "model"

    def fail() -> None:
        with write.complete_or_absent(target) as folder:
            (folder / "config.json").touch()
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    assert list(target.parent.iterdir()) == []
    with write.complete_or_absent(target) as folder:
        (folder / "config.json").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    with pytest.raises(DataError, match="nothing is overwritten"), write.complete_or_absent(target):
        pass


def test_the_copied_config_names_the_written_dtype(tmp_path: Path) -> None:
    """transformers casts to what config.json says: a float32 result would be read as bfloat16."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "hidden_size": 4}))
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "model.safetensors.index.json"):
        (source / name).touch()
    write.copy_all_but_weights(source, target, "float32")
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert json.loads((target / "config.json").read_text()) == {"torch_dtype": "float32", "hidden_size": 4}
