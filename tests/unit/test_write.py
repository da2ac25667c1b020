"""A folder that is written beside its place: whole or absent, by one process, with configuration that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sglang import hf_files
from megatron_sglang.errors import DataError
from megatron_sglang.weights import write
from megatron_sglang.weights.shard_folder import continued
from megatron_sglang.weights.write import partial_name


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


def test_two_processes_do_not_mix_in_one_folder(tmp_path: Path) -> None:
    """Files of both were in the result, and both called it a success."""
    target = tmp_path / "model"
    partial_name(target).mkdir()
    (partial_name(target) / "of a killed process").touch()
    with write.complete_or_absent(target) as folder:
        (folder / "config.json").touch()
        with pytest.raises(DataError, match="being written by another process"), write.complete_or_absent(target):
            pass
    assert [path.name for path in target.iterdir()] == ["config.json"]


@pytest.mark.parametrize("make", [write.complete_or_absent, lambda path: continued(path, {})])
def test_the_working_folder_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any]
) -> None:
    """The name . has nothing to write beside, and nothing can be renamed to it."""
    monkeypatch.chdir(tmp_path)
    with make(Path()):
        (partial_name(Path()) / "config.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(DataError, match="no name for a new folder"):
        partial_name(Path("/"))


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


def test_the_copied_config_counts_no_layers_that_are_not_there(tmp_path: Path) -> None:
    """A version of `sync.method=disk` has none for multi-token prediction; who loads it must not look for one."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    config = {"dtype": "float32", "num_hidden_layers": 46, "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    write.copy_all_but_weights(source, target, "float32", predicts=False)
    assert json.loads((target / "config.json").read_text()) == config | {"num_nextn_predict_layers": 0}
    write.copy_all_but_weights(source, target, "float32")
    assert json.loads((target / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("config", "predicting"),
    [
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, {"model.layers.2.a", "mtp.norm.weight"}),
        (
            {"num_hidden_layers": 1, "mtp_num_hidden_layers": 1},
            {"model.layers.1.a", "model.layers.2.a", "mtp.norm.weight"},
        ),
        ({"text_config": {"num_hidden_layers": 2, "mtp_num_layers": 1}}, {"model.layers.2.a", "mtp.norm.weight"}),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, {"mtp.norm.weight"}),
        ({"num_hidden_layers": 2}, {"mtp.norm.weight"}),
        (None, {"mtp.norm.weight"}),
    ],
)
def test_layers_for_multi_token_prediction_are_told_from_the_models(
    tmp_path: Path, config: dict[str, Any] | None, predicting: set[str]
) -> None:
    """A layer of the model that was taken for one would never be sent; a vision tower has numbers of its own."""
    names = [*(f"model.layers.{number}.a" for number in range(3)), "model.visual.layers.9.a", "mtp.norm.weight"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf_files.prediction_shapes(tmp_path).keys() == predicting
    assert hf_files.tensor_shapes(tmp_path).keys() == set(names) - predicting
