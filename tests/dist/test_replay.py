"""Routing replay on real Megatron: its own choices replayed change nothing, other choices do, whatever the layout."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

HF = "examples/tiny_fim/model"
TP2_SP = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
RECOMPUTE = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
LAYOUTS = {
    "world1": (1, {}),
    "ep2": (2, {"expert-model-parallel-size": 2}),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
    "recompute": (1, RECOMPUTE),
    "recompute_half": (1, RECOMPUTE | {"recompute-method": "block", "recompute-num-layers": 2}),
    "pp2_recompute": (2, {"pipeline-model-parallel-size": 2, **RECOMPUTE}),
}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def told(run_ranks):
    return run_ranks(1, "cases_replay.record", hf=HF, count=16)[0]


@pytest.fixture(scope="module")
def plain(run_ranks):
    """Without replay, one rank."""
    return run_ranks(1, "cases_replay.train", hf=HF, layout={}, told=None)[0]


@pytest.fixture(scope="module")
def spoiled(run_ranks, told):
    """With other experts, one rank."""
    return run_ranks(1, "cases_replay.train", hf=HF, layout={}, told=told, spoil=True)[0]


def assert_alike(found, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(found["curve"], expected["curve"], strict=True):
        assert math.isclose(loss, expected_loss, rel_tol=1e-5, abs_tol=1e-6), (found, expected)
        assert math.isclose(norm, expected_norm, rel_tol=1e-5), (found, expected)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_what_megatron_chose_itself_changes_nothing(run_ranks, told, plain, name):
    """A wrong token order, shard, layer or micro-batch would send tokens elsewhere. The first step's routers agree with
    what is replayed; then the weights move, and only the replayed choice stays."""
    ranks, layout = LAYOUTS[name]
    reports = run_ranks(ranks, "cases_replay.train", hf=HF, layout=layout, told=told)
    (loss, norm), (expected_loss, expected_norm) = reports[-1]["curve"][0], plain["curve"][0]
    assert math.isclose(loss, expected_loss, rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(norm, expected_norm, rel_tol=1e-5)
    for report in reports:
        assert report["metrics"][0]["train/routing_disagreement"] == 0.0, name


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_other_experts_are_taken_alike_in_every_layout(run_ranks, told, plain, spoiled, name):
    """That replay does anything at all; and with experts that no router would choose, each wrong place shows."""
    ranks, layout = LAYOUTS[name]
    reports = run_ranks(ranks, "cases_replay.train", hf=HF, layout=layout, told=told, spoil=True)
    assert_alike(reports[-1], spoiled)
    assert abs(spoiled["curve"][0][1] / plain["curve"][0][1] - 1) > 1e-2, (spoiled, plain)
    assert all(report["metrics"][0]["train/routing_disagreement"] > 0.5 for report in reports)


def test_logprobs_are_scored_with_the_experts(run_ranks, told, plain, spoiled):
    """Old logprobs by other experts than the train step's would make ratios of 1 something else."""
    same = run_ranks(1, "cases_replay.train", hf=HF, layout={}, told=told)[0]
    assert same["scored"] == pytest.approx(plain["scored"], rel=1e-7)
    assert abs(spoiled["scored"] - plain["scored"]) > 1.0


RUN = (
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=2 rollout.eval_samples=4 reward.name=function:letter_reward.vowels --micro-batch-size 2 "
    "--global-batch-size 4 --moe-enable-routing-replay"
).split()


def test_a_run_takes_what_the_engine_says(run_ranks, tmp_path):
    """The fake engine's experts have nothing to do with the scores: what the trainer's routers would choose differs.
    Two train steps with a learning rate of 0: old logprobs are the policy's, if both come from the same experts."""
    assert run_ranks(2, "run", argv=[*RUN, "--lr=0", "--min-lr=0", f"log.run_dir={tmp_path}"]) == ["", ""]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    assert len(records) == 2
    assert all(record["train/routing_disagreement"] > 0.5 for record in records)
    assert all(record["train/kl_old"] < 1e-10 for record in records)
    assert all(record["train/kl_ref"] > 1e-3 for record in records), "the reference policy routes by itself"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--moe-router-fusion"], "does not replay"),
        (["rollout.environment={name: feed}"], "without the engine's experts"),
        (["dense"], "has no experts"),
    ],
)
def test_what_cannot_be_replayed_is_refused(run_ranks, tmp_path, more, text):
    """Megatron's fused router takes the flag and does not replay."""
    if more == ["dense"]:
        from tiny_models import make_model

        folder = make_model("qwen3", tmp_path)
        for file in Path(HF).glob("tokenizer*.json"):  # else another rank may first find that prompts cannot be made
            shutil.copy(file, folder)
        more = [f"model.hf_path={folder}", "--expert-model-parallel-size=1"]
    for found in run_ranks(2, "run", argv=[*RUN, f"log.run_dir={tmp_path}", *more]):
        assert text in found, found
