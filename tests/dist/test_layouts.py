"""One answer, whatever the layout: losses, gradients and exported weights under TP, SP, EP, PP."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_sglang.hf_files import tensor_shapes
from megatron_sglang.placement import Placement
from megatron_sglang.plan import memory, shapes
from megatron_sglang.plan.trainer import Trainer
from megatron_sglang.transfer import row_of

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

HF = "examples/tiny_fim/model"
LAYOUTS = {
    "world1": (1, {}),
    "tp2_sp": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "ep2": (2, {"expert-model-parallel-size": 2}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
    "tp2_ep2": (4, {"tensor-model-parallel-size": 2, "sequence-parallel": True, "expert-model-parallel-size": 2}),
    "tp2_ep2_pp2": (
        4,
        {
            "tensor-model-parallel-size": 2,
            "sequence-parallel": True,
            "expert-model-parallel-size": 2,
            "pipeline-model-parallel-size": 2,
        },
    ),
}

FLAGS = {"tp": "tensor-model", "pp": "pipeline-model", "ep": "expert-model"}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def reference(run_ranks):
    return run_ranks(1, "train", hf=HF, layout={})[0]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "world1"])
def test_loss_and_grad_norm_equal_world1(run_ranks, reference, name):
    """A layout that changes the loss or its gradient trains something else."""
    ranks, layout = LAYOUTS[name]
    curves = run_ranks(ranks, "train", hf=HF, layout=layout)
    last_stage = curves[-1]
    for (loss, norm), (expected_loss, expected_norm) in zip(last_stage, reference, strict=True):
        assert math.isclose(loss, expected_loss, rel_tol=1e-5, abs_tol=1e-6), (last_stage, reference)
        assert math.isclose(norm, expected_norm, rel_tol=1e-5), (last_stage, reference)


@pytest.mark.parametrize("layout", [{}, {"pipeline-model-parallel-size": 2}], ids=["pp1", "pp2"])
@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputed_layers_train_the_same(run_ranks, reference, layout, method):
    """With a frozen base nothing that enters the first layer wants a gradient, and a checkpointed one would give none:
    the adapters would stay as they are, without an error. block: one layer of each stage, the others keep theirs."""
    full = {"recompute-granularity": "full", "recompute-method": method, "recompute-num-layers": 1}
    curve = run_ranks(len(layout) + 1, "train", hf=HF, layout=layout | full)[-1]
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
        assert math.isclose(loss, expected_loss, rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(norm, expected_norm, rel_tol=1e-5)


def test_a_dense_model_trains_over_pipeline_stages(run_ranks, tmp_path):
    """Megatron asks also of models without experts how tokens are dispatched, and its default refuses our lengths."""
    from tiny_models import make_model

    hf = str(make_model("qwen3", tmp_path))
    layout = {"pipeline-model-parallel-size": 2}
    expected = run_ranks(1, "train", hf=hf, layout={}, on_policy=True)[0]
    found = run_ranks(2, "train", hf=hf, layout=layout, on_policy=True)[-1]
    assert all(norm > 1e-3 for _, norm in expected), expected
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert math.isclose(loss, expected_loss, rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(norm, expected_norm, rel_tol=1e-5)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_merged_export_equals_the_lora_model(run_ranks, name):
    """Bridge's own merge is off by 8 under EP with SequentialMLP; ours must be exact, and the adapters must matter."""
    ranks, layout = LAYOUTS[name]
    found = [result for result in run_ranks(ranks, "merged_export", hf=HF, layout=layout) if result]
    assert found
    for result in found:
        assert result["moved"] > 0.5, result
        assert result["difference"] <= 1e-4, result


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "world1"])
def test_direct_path_delivers_what_the_generic_path_exports(run_ranks, name):
    """Every element once, from a rank that owns it, merged, bit for bit; from one bucket to many. And where the last
    rank fails after two, all end there together, by what the exchange itself says."""
    ranks, layout = LAYOUTS[name]
    limits = {"tp2_sp": 1 << 30, "ep2": 20_000}
    found = run_ranks(ranks, "direct", hf=HF, layout=layout, engine_ranks=2, limit=limits.get(name, 100_000))
    for result in found:
        assert result["wrong"] == 0
        assert result["elements"] == result["wanted"]
        assert result["ended_after"] == min(2, result["buckets"])
    assert found[0]["wanted"] > 400_000
    assert found[0]["buckets"] == 1 if name == "tp2_sp" else found[0]["buckets"] > 3


@pytest.mark.parametrize(
    ("name", "engine_ranks", "hosts"), [("world1", 2, None), ("ep2", 1, None), ("ep2", 3, None), ("ep2", 3, 1)]
)
def test_direct_path_between_sides_of_other_sizes(run_ranks, name, engine_ranks, hosts):
    """Split: one trainer rank hands over to several engine ranks, or none; hosts: only those on the engine's node."""
    ranks, layout = LAYOUTS[name]
    found = run_ranks(ranks, "direct", hf=HF, layout=layout, engine_ranks=engine_ranks, limit=100_000, hosts=hosts)
    assert [result["wrong"] for result in found] == [0] * ranks
    assert [result["elements"] for result in found] == [result["wanted"] for result in found]
    assert [result["wanted"] > 0 for result in found] == [rank < (hosts or engine_ranks) for rank in range(ranks)]


def test_with_one_buffer_of_each_kind_no_bucket_is_sent_before_the_last_one_was_taken(run_ranks):
    """Where trainer and engine take turns on a GPU; the engine rank would read what is being overwritten."""
    ranks, layout = LAYOUTS["ep2"]
    found = run_ranks(ranks, "direct", hf=HF, layout=layout, engine_ranks=2, limit=100_000, buffers=1)
    assert [result["wrong"] for result in found] == [0, 0]
    assert all(result["elements"] == result["wanted"] > 400_000 and result["buckets"] > 3 for result in found)


def assert_planned(run_ranks, hf, ranks, layout, case="shards_of_this_rank", whole=()):
    """The plan's rectangles of the trainer are those of a real model, and lie where it has them. whole: ends of names
    that the plan has whole on each rank; what the model here has of them is not compared."""
    sizes = {short: layout.get(f"{flag}-parallel-size", 1) for short, flag in FLAGS.items()}
    found, heads = shapes.hub_shapes(Path(hf)), shapes.heads(Path(hf))
    trainer = Trainer(found, heads, Placement(world_size=ranks, **sizes))
    planned, held = trainer.shards(), run_ranks(ranks, case, hf=hf, layout=layout)
    peaks = memory.peaks_of(found, trainer, memory.Job(lora_rank=8), [0] * ranks)  # as cases.make_config
    assert [adapters for _, adapters in held] == [one.trained.gradients // memory.GRADIENT_BYTES for one in peaks]
    for shard in [shard for shard in planned if shard.name.endswith(whole)] if whole else []:
        assert (shard.box.rows, shard.box.cols) == found[shard.name], shard
    planned = [shard for shard in planned if not whole or not shard.name.endswith(whole)]
    real = [row for rows, _ in held for row in rows if not whole or not row[1].endswith(whole)]
    fields = [
        Counter(json.dumps([rank, name, box, place[1:]]) for rank, name, box, place in rows)
        for rows in (real, map(row_of, planned))
    ]
    assert fields[0] == fields[1]
    # Parameters have other names here, but what shares one there shares one here.
    together = {(row[0], row[3][0], row[1]) for row in real}, {(s.rank, s.place.tensor, s.name) for s in planned}
    groups = [
        {(rank, *sorted(n for r, p, n in pairs if (r, p) == (rank, param))) for rank, param, _ in pairs}
        for pairs in together
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_plan_command_knows_what_megatron_holds(run_ranks, name):
    """`megatron-sglang plan` works from names and placement alone; it must name the very rectangles of a real model."""
    assert_planned(run_ranks, HF, *LAYOUTS[name])


@pytest.mark.parametrize(("model", "name"), [("llama", "tp2_sp"), ("qwen3", "tp2_sp"), ("qwen3_moe", "tp2_ep2_pp2")])
def test_the_plan_command_knows_other_models(run_ranks, model, name, tmp_path):
    """Dense layers; a head that is not tied, on the last stage."""
    from tiny_models import make_model

    assert_planned(run_ranks, str(make_model(model, tmp_path)), *LAYOUTS[name])


def test_random_weights_are_the_same_on_all_copies_and_need_no_files(run_ranks, tmp_path):
    """Data-parallel ranks that drew different weights train nonsense, and the engine gets one rank's or the other's.
    Bridge asks safetensors files for names even to export."""
    shutil.copy(Path(HF, "config.json"), tmp_path)
    first, second = run_ranks(2, "drawn_weights", hf=str(tmp_path), layout={})
    assert first == second
    assert first["exported"] == sorted(tensor_shapes(HF))


@pytest.mark.parametrize("name", ["world1", "tp2_sp", "ep2"])
def test_weights_merged_for_a_while_are_the_model(run_ranks, name):
    """Old logprobs of what the engine serves (algo.old_logprobs=merged); the pristine base must survive."""
    ranks, layout = LAYOUTS[name]
    for found in run_ranks(ranks, "merged_in_place", hf=HF, layout=layout):
        assert found["moved"] > 10
        assert found["restored"]
        assert found["difference"] < 1e-4 < 0.1 < found["learned"], found


@pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
def test_grouped_experts_are_merged_in_one_go(run_ranks, chunk):
    """As GPUs do it: all experts of a layer together, in temporaries of bounded size, and what the cast lost."""
    found = run_ranks(1, "cases_merge.grouped_merge", experts=5, chunk=chunk)[0]
    assert found["equal"]
    for name in ("norm", "loss"):
        assert math.isclose(*found[name], rel_tol=1e-5), found
    assert found["loss"][0] > 1e-4, "in bf16 something must be lost"
    assert 0.9 < found["changed"] <= 1.0
    assert list(found["layers"]) == ["1"]
    assert found["layers"]["1"][0] == found["norm"][0]


def test_a_layer_of_grouped_experts_is_merged_once_for_a_file(run_ranks):
    """Bridge exports expert after expert, fc1 and fc2 in turn; merging anew at each turn would be 16 times the work."""
    found = run_ranks(1, "cases_merge.mixed_merge", experts=4)[0]
    assert len(found["made"]) == 2, found
    assert found["equal"]
