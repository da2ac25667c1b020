"""Folders as the hub has GLM-4.5 and DeepSeek-V3: with a layer for multi-token prediction, which no run trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_layouts import LAYOUTS
from test_models import assert_delivered

from megatron_sglang.hf_files import prediction_shapes, tensor_shapes

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("model", "name"), [("glm4_moe", "tp2_ep2_pp2"), ("deepseek_v3", "tp2_sp")])
def test_the_trainer_and_what_it_sends_are_without_it(run_ranks, tmp_path, model, name):
    """Bridge gives the trainer such a layer. It would be adapted without ever getting a gradient, its tensors are
    unknown to SGLang's loader, which takes the direct path away, and some of them Bridge does not export."""
    from tiny_models import add_prediction_layer, make_model

    hf = str(add_prediction_layer(make_model(model, tmp_path)))
    assert len(prediction_shapes(hf)) > 40
    ranks, layout = LAYOUTS[name]
    given = {"hf": hf, "layout": layout, "engine_ranks": 2, "limit": 50_000}
    assert_delivered(run_ranks(ranks, "cases_models.direct", **given))


def test_merged_weights_have_the_bases(run_ranks, tmp_path):
    """A model that was made without it could no longer be served with speculative decoding, and its config.json would
    speak of a layer that is not there. A conversion that is killed when all of it is written must not begin it anew."""
    from tiny_models import add_prediction_layer, make_model

    hf = add_prediction_layer(make_model("qwen3_moe", tmp_path / "model"))
    checkpoint, output = str(tmp_path / "checkpoint"), tmp_path / "back"
    from_hf = {"hf_model": str(hf), "save": checkpoint, "rank": 4}
    to_hf = {"hf_model": str(hf), "load": checkpoint, "output": str(output), "shard_bytes": 10**5}
    count = len(tensor_shapes(hf)) + len(prediction_shapes(hf))
    run_ranks(1, "cases_convert.convert", calls=[("import_adapter", from_hf)])
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, "cases_convert.dies", doing="os.rename", at="part-00002", **to_hf)
    assert run_ranks(1, "cases_convert.convert", calls=[("export_merged", to_hf)])[0] == [count]
    back = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    given = load_file(hf / "model.safetensors")
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in given.items())
    assert (output / "config.json").read_bytes() == (hf / "config.json").read_bytes()
