"""A broken model folder is named before anything is started."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_sglang.errors import DataError
from megatron_sglang.training import hf_folder

MODEL = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_folder_passes(folder: Path) -> None:
    hf_folder.check(str(folder), weights=True)


@pytest.mark.parametrize(
    ("text", "said"), [('{"architectures": [', "config.json is not JSON"), ("[]", "holds a JSON list")]
)
def test_config_json_that_cannot_be_read(folder: Path, text: str, said: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=said):
        hf_folder.check(str(folder), weights=False)


@pytest.mark.parametrize("size", [0, 4, 300, 100_000])
def test_weights_that_are_cut_off(folder: Path, size: int) -> None:
    """An interrupted download must not kill one rank in the middle of loading."""
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(DataError, match=r"model.safetensors has .*fetch the file again"):
        hf_folder.check(str(folder), weights=True)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    hf_folder.check(str(folder), weights=False)
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        hf_folder.check(str(folder), weights=True)


def test_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"lacks 1 files of model\.safetensors\.index\.json, model-00002-of-00002"):
        hf_folder.check(str(folder), weights=True)


@pytest.mark.parametrize(
    ("changes", "in_weights"),
    [
        ({"hidden_size": 256}, 128),
        ({"vocab_size": 640}, 512),
        ({"num_hidden_layers": 2}, 4),
        ({"num_hidden_layers": 6}, 4),
        ({"num_local_experts": 4}, 8),
        ({"num_experts": 16}, 8),
    ],
)
def test_config_json_of_another_model(folder: Path, changes: dict[str, int], in_weights: int) -> None:
    """With fewer layers or experts than the weights have, another model would train without a word."""
    edit(folder, **changes)
    [(name, given)] = changes.items()
    with pytest.raises(DataError, match=f"says {name}={given}, the weights have {in_weights}"):
        hf_folder.check(str(folder), weights=True)
