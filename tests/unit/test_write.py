"""A folder that is written beside its place: whole or absent, by one process, with configuration that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
