"""Packed micro-batches by a budget of tokens train what padded ones train, in every layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

HF = "examples/tiny_fim/model"
BUDGET = {"max-seqlen-per-dp-cp-rank": 128}
FULL = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
ATTENTION = {"recompute-granularity": "selective"}
LAYOUTS = {
    "world1": (1, {}),
    "ep2": (2, {"expert-model-parallel-size": 2}),
    "tp2_sp_recompute": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True, **ATTENTION}),
    "pp2_recompute": (2, {"pipeline-model-parallel-size": 2, **FULL}),
    "vpp2": (2, {"pipeline-model-parallel-size": 2, "num-virtual-stages-per-pipeline-rank": 2}),
}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tiny_models import make_model

    return str(make_model("qwen3", tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def told(run_ranks) -> list[Any]:
    return run_ranks(1, "cases_replay.record", hf=HF, count=32)[0]


def compare(run_ranks, folder: Path, ranks: int, **case: Any) -> tuple[list[Any], list[Any]]:
    """Padded and packed; asserts that they are the same to five digits."""
    found, gradients = {}, {}
    for name, more in (("padded", {}), ("packed", BUDGET)):
        (folder / name).mkdir()
        arguments = {**case, "layout": case["layout"] | more, "folder": str(folder / name)}
        found[name] = run_ranks(ranks, "cases_packing.train", **arguments)
        gradients[name] = [torch.load(folder / name / f"{rank}.pt") for rank in range(ranks)]
    padded, packed = found["padded"][-1], found["packed"][-1]
    for before, after in zip(padded["curve"], packed["curve"], strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
    for before, after in zip(padded["metrics"], packed["metrics"], strict=True):
        before, after = ({n: v for n, v in values.items() if n != "train/padding"} for values in (before, after))
        assert after == pytest.approx(before, rel=1e-5, abs=3e-6)  # kl_old_k1 is a mean of both signs
    for rank in range(ranks):
        for step in range(2):
            before, after = gradients["padded"][rank][step], gradients["packed"][rank][step]
            assert before.norm() > 0
            assert (after - before).norm() < 1e-5 * before.norm(), (rank, step)
    for kind in ("old", "ref"):
        before, after = ({k: v for part in found[n] for k, v in part["scored"][kind].items()} for n in found)
        assert len(before) == 32
        assert after == pytest.approx(before, rel=1e-6)
    return found["padded"], found["packed"]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_packed_trains_as_padded(run_ranks, tmp_path, name) -> None:
    """A token that sees its neighbour's, a label of another sample, a denominator by micro-batch, a position that runs
    on: each trains something else."""
    ranks, layout = LAYOUTS[name]
    padded, packed = compare(run_ranks, tmp_path, ranks, hf=HF, layout=layout)
    assert packed[0]["packed"]
    assert not padded[0]["packed"]
    assert all(tokens <= 128 for rank in packed for tokens in rank["tokens"])
    assert len({tuple(rank["micro_batches"]) for rank in packed}) == 1
    assert packed[0]["micro_batches"] < padded[0]["micro_batches"]
    shares = [rank[-1]["metrics"][0]["train/padding"] for rank in (padded, packed)]
    assert shares[1] < shares[0], shares


def test_a_dense_model_too(run_ranks, tmp_path, dense) -> None:
    compare(run_ranks, tmp_path, 2, hf=dense, layout={})


@pytest.mark.parametrize("name", ["tp2_sp_recompute", "pp2_recompute", "vpp2"])
def test_experts_are_replayed_in_packed_sequences(run_ranks, tmp_path, told, name) -> None:
    """Experts that no router would choose: each wrong place shows."""
    ranks, layout = LAYOUTS[name]
    _, packed = compare(run_ranks, tmp_path, ranks, hf=HF, layout=layout, told=told)
    assert packed[-1]["metrics"][0]["train/routing_disagreement"] > 0.5


RUN = (
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=3 rollout.eval_samples=4 reward.name=function:letter_reward.vowels --global-batch-size 4"
).split()


def test_a_run_trains_the_same_in_fewer_micro_batches(run_ranks, tmp_path) -> None:
    """Through Megatron's loop, whose own count of micro-batches does not change: neither do iterations, the schedule of
    the learning rate, or the two train steps of a rollout batch. The fake engine answers by the weights' last bits, so
    only the first rollout batch has the same samples."""
    decay = ["--micro-batch-size=1", "--lr-decay-style=linear", "--min-lr=0"]
    records = {}
    for name, more in (("padded", []), ("packed", ["--max-seqlen-per-dp-cp-rank=256"])):
        argv = [*RUN, *decay, *more, f"log.run_dir={tmp_path / name}"]
        assert run_ranks(2, "run", argv=argv) == ["", ""]
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        records[name] = [record for record in lines if "train/loss" in record]
    assert len(records["padded"]) == len(records["packed"]) == 3
    before, after = (found[0] for found in records.values())
    differ = ("train/padding", "train/micro_batches")
    names = [name for name in before if name.startswith(("train/", "rollout/")) and name not in differ]
    assert len(names) > 15
    for name in names:
        assert after[name] == pytest.approx(before[name], rel=1e-5, abs=3e-6), name
    moved = [found[1]["sync/update_norm"] for found in records.values()]
    assert moved[1] == pytest.approx(moved[0], rel=1e-5)
    assert [[record["train/micro_batches"] for record in found] for found in records.values()] == [[2] * 3, [1] * 3]
    assert [record["train/padding"] for record in records["packed"]] == [0.0] * 3
    assert all(record["train/padding"] > 0 for record in records["padded"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--hybrid-context-parallel"], "and --hybrid-context-parallel is not there"),
        (
            [
                *("--pipeline-model-parallel-size=2", "--expert-model-parallel-size=1"),
                *("--num-virtual-stages-per-pipeline-rank=2", "--microbatch-group-size-per-virtual-pipeline-stage=3"),
            ],
            "take the 4 samples that a data-parallel rank has in a train step in runs of 3",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(run_ranks, tmp_path, more, text) -> None:
    """Megatron's own use of the number, and stages that no number of micro-batches would suit."""
    argv = [*RUN, "--max-seqlen-per-dp-cp-rank=256", f"log.run_dir={tmp_path}", *more]
    for found in run_ranks(2, "run", argv=argv):
        assert text in found, found
