"""Models beyond the example's kind through the direct path's trainer side: bf16, GLM4-MoE, DeepSeek-V3."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_layouts import HF, LAYOUTS, assert_planned

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

pytestmark = pytest.mark.dist


def assert_delivered(found: list[dict[str, int]]) -> None:
    assert found[0]["wanted"] > 50_000
    for result in found:
        assert result["wrong"] == 0
        assert result["elements"] == result["wanted"]
        assert result["buckets"] > 2


@pytest.mark.parametrize("name", ["tp2_sp", "tp2_ep2_pp2"])
def test_bf16_is_delivered_as_the_generic_path_exports_it(run_ranks, name):
    """What every run on a GPU sends: merged in fp32, rounded once, on the same side by both paths."""
    ranks, layout = LAYOUTS[name]
    given = {"hf": HF, "layout": layout, "engine_ranks": 2, "limit": 100_000}
    assert_delivered(run_ranks(ranks, "direct", dtype="bfloat16", **given))


@pytest.mark.parametrize(
    ("model", "name"),
    [("glm4_moe", "tp2_sp"), ("glm4_moe", "tp2_ep2_pp2"), ("deepseek_v3", "ep2"), ("deepseek_v3", "tp2_sp")],
)
def test_other_models_are_delivered_as_the_generic_path_exports_them(run_ranks, model, name, tmp_path):
    """Dense layers before MoE ones, shared experts, a bias of the router, latent attention: a rectangle of any of them
    that is taken from the wrong place is a model that answers, and wrongly."""
    from tiny_models import make_model

    hf = str(make_model(model, tmp_path))
    ranks, layout = LAYOUTS[name]
    given = {"hf": hf, "layout": layout, "engine_ranks": 2, "limit": 50_000}
    assert_delivered(run_ranks(ranks, "cases_models.direct", **given))


@pytest.mark.parametrize("name", ["tp2_sp", "tp2_ep2_pp2"])
def test_the_plan_command_knows_glm4_moe(run_ranks, name, tmp_path):
    """Shared experts are split over TP as dense layers are, and not over EP; the router's bias is whole everywhere."""
    from tiny_models import make_model

    hf = str(make_model("glm4_moe", tmp_path))
    assert_planned(run_ranks, hf, *LAYOUTS[name], case="cases_models.shards_of_this_rank")


@pytest.mark.parametrize("name", ["ep2", "tp2_sp"])
def test_the_plan_command_knows_deepseek_v3(run_ranks, name, tmp_path):
    """Without Transformer Engine Megatron splits also what goes down over TP; on a GPU each rank has it whole."""
    from tiny_models import make_model

    hf = str(make_model("deepseek_v3", tmp_path))
    down = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight") if name == "tp2_sp" else ()
    assert_planned(run_ranks, hf, *LAYOUTS[name], case="cases_models.shards_of_this_rank", whole=down)


@pytest.mark.parametrize("model", ["glm4_moe", "deepseek_v3"])
def test_engine_and_trainer_choose_experts_by_the_same_bias(run_ranks, model, tmp_path):
    """Megatron rounds it to bf16 when it wraps a model and computes with it in fp32 then; an engine with the file's
    bias would choose other experts. And it must stay: Megatron would move it after each train step, outside the
    optimizer, and checkpoints hold adapters only."""
    from tiny_models import make_model

    found = run_ranks(1, "cases_models.router_bias", hf=str(make_model(model, tmp_path)))[0]
    assert found == {"sent": 1, "agree": [True], "rounded": [True], "moves_by": 0.0}


def test_latent_attention_is_refused_on_a_cpu(run_ranks, tmp_path):
    """Megatron's own message is a TypeError out of three constructors."""
    from tiny_models import make_model

    with pytest.raises(
        AssertionError, match=r"DataError: the model has latent attention .* choose another model, or a GPU"
    ):
        run_ranks(1, "drawn_weights", hf=str(make_model("deepseek_v3", tmp_path)), layout={})
