"""A conversion of a model that is larger than memory, and one that is cut short and started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_layouts import HF

pytestmark = pytest.mark.dist

TP2 = {"tensor-model-parallel-size": 2}
EP2 = {"expert-model-parallel-size": 2}
LORA = {"rank": 8, "alpha": 16}
MB = 10**6


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(where.values())}
    return {name: files[file][name] for name, file in where.items()}


@pytest.fixture(scope="module")
def saved(run_ranks, tmp_path_factory) -> dict[str, Any]:
    """The arguments of a conversion to some twenty shards, without its output; the uninterrupted one is in `whole`."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, "cases_convert.save", hf=HF, folder=str(folder / "run"), layout={}, lora=LORA)
    given = {"hf_model": HF, "load": str(folder / "run"), "shard_bytes": 10**5}
    run_ranks(1, "cases_convert.convert", calls=[("export_merged", given | {"output": str(folder / "whole")})])
    return given


def killed(run_ranks, saved: dict[str, Any], output: Path, at: str, doing: str = "open") -> Path:
    """Where the conversion lies that was killed before it could do that to the file `at`."""
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "cases_convert.dies", doing=doing, at=at, output=str(output), sizes=EP2, **saved)
    assert not output.exists()
    return output.with_name(f".{output.name}.partial")


def test_a_killed_conversion_goes_on_where_it_stopped(run_ranks, saved, tmp_path):
    """Hours of a large model. What was finished is not written again, one shard that is damaged is, and the result is
    that of one go. The layout may be another: it may have been the reason for the end."""
    output = tmp_path / "model"
    partial = killed(run_ranks, saved, output, "part-00009")
    parts = {f"part-{number:05d}" for number in range(1, 10)}
    assert {path.name for path in partial.iterdir()} == parts | {".conversion.json"}
    times = {name: (partial / name).stat().st_mtime_ns for name in parts}
    with (partial / "part-00003").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    call = saved | {"output": str(output), "sizes": TP2}
    assert run_ranks(2, "cases_convert.convert", calls=[("export_merged", call)])[0] == [134]
    found, expected = tensors(output), tensors(Path(saved["load"]).with_name("whole"))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    files = sorted(output.glob("*.safetensors"))
    same = [files[number].stat().st_mtime_ns == times[f"part-{number + 1:05d}"] for number in range(9)]
    assert same == [True, True, False, True, True, True, True, True, False]
    assert not (output / ".conversion.json").exists()
    assert not partial.exists()


def test_a_conversion_killed_at_its_end_writes_no_shard_again(run_ranks, saved, tmp_path):
    """When shards are given their final names, some have theirs and some do not."""
    output = tmp_path / "model"
    killed(run_ranks, saved, output, "part-00005")
    partial = killed(run_ranks, saved, output, "part-00007")
    assert len(list(partial.glob("part-*"))) == 7
    killed(run_ranks, saved, output, "part-00004", doing="os.rename")
    assert len(list(partial.glob("model-0000[123]-of-*.safetensors"))) == 3
    finished = [path.stat().st_mtime_ns for path in (*sorted(partial.glob("model-*")), *sorted(partial.glob("part-*")))]
    assert len(finished) >= 20
    calls = [
        ("export_adapter", {name: saved[name] for name in ("hf_model", "load")} | {"output": str(output)}),
        ("export_merged", saved | {"output": str(output), "hf_model": str(tmp_path / "other")}),
        ("export_merged", saved | {"output": str(output)}),
        ("export_merged", saved | {"output": str(output)}),
    ]
    shutil.copytree(HF, tmp_path / "other")
    adapter, other, done, again = run_ranks(1, "cases_convert.convert", calls=calls)[0]
    assert "is an unfinished conversion of a model" in adapter
    assert f"with another model: {Path(HF).resolve()}, asked for {tmp_path / 'other'}; give" in other
    assert done == 134
    assert "nothing is overwritten" in again
    assert [path.stat().st_mtime_ns for path in sorted(output.glob("*.safetensors"))] == finished
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"


def test_memory_is_one_shard_and_one_bucket(run_ranks, tmp_path):
    """A rank that has just room for its part of the model must be able to convert it; and an adapter of all its
    experts."""
    import transformers

    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32, "head_dim": 64, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    large = str(tmp_path / "large")
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads)).save_pretrained(large)
    lora = {"rank": 128, "alpha": 1}
    run_ranks(2, "cases_convert.save", hf=large, folder=str(tmp_path / "run"), layout=TP2, lora=lora)
    given = {"hf": large, "load": str(tmp_path / "run"), "layout": TP2}
    found = {}
    for size in (16 * MB, 1000 * MB):
        sizes = {"output": str(tmp_path / str(size)), "shard_bytes": size, "bucket_bytes": size}
        found[size] = run_ranks(2, "cases_convert.growths", **given, **sizes)[0]
    model = sum(path.stat().st_size for path in (tmp_path / "16000000" / "merged").glob("*.safetensors"))
    adapter = (tmp_path / "16000000" / "adapter" / "adapter_model.safetensors").stat().st_size
    one_weight = 24 * MB  # gathering, merging and writing the largest, 2 MB, with all copies of it
    assert model > 130 * MB
    assert adapter > 90 * MB
    assert found[16 * MB][0] < (16 + 16) * MB + one_weight
    assert found[16 * MB][1] < adapter / 32 + one_weight
    assert found[1000 * MB][0] > 1.9 * model  # what is measured is what is held: one shard and one bucket of everything
