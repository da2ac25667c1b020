"""Virtual pipeline stages (Megatron's interleaved schedule): the same training, weights and checkpoints as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

HF = "examples/tiny_fim/model"
PP2 = {"pipeline-model-parallel-size": 2}
VPP2 = PP2 | {"num-virtual-stages-per-pipeline-rank": 2}
EP2 = {"expert-model-parallel-size": 2}
TP2_SP = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
FULL = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def told(run_ranks) -> list[Any]:
    return run_ranks(1, "cases_replay.record", hf=HF, count=32)[0]


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(2, {}), (4, EP2), (4, TP2_SP | FULL), (2, {"overlap-p2p-communication-warmup-flush": True})],
    ids=["pp2", "ep2", "tp2_sp_recompute", "flush"],
)
def test_the_same_losses_and_logprobs(run_ranks, told, tmp_path, ranks, more) -> None:
    """Chunks that share an iterator, or a loss on each of them; activations taken for gradients, which pass between the
    same two ranks; with the experts replayed, another micro-batch's."""
    plain = {flag: size for flag, size in more.items() if "p2p" not in flag}
    found = [
        run_ranks(ranks, "cases_packing.train", hf=HF, layout=layout, folder=str(tmp_path), told=told)
        for layout in (PP2 | plain, VPP2 | more)
    ]
    for before, after in zip(*(reports[-1]["curve"] for reports in found), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
    for before, after in zip(*(reports[-1]["metrics"] for reports in found), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=3e-6)
    for kind in ("old", "ref"):
        before, after = (
            {place: value for rank in reports for place, value in rank["scored"][kind].items()} for reports in found
        )
        assert len(before) == 32
        assert after == pytest.approx(before, rel=1e-6)


def test_the_same_gradients_and_weights(run_ranks, tmp_path) -> None:
    """Layers are dealt out otherwise: 0 and 2 to the first rank, 1 and 3 to the second. A chunk whose weights were not
    loaded, or that has another layer's adapters, or that nobody exports, must show."""
    held = {}
    for name, layout in (("plain", PP2), ("virtual", VPP2)):
        (tmp_path / name).mkdir()
        folder = str(tmp_path / name)
        report = run_ranks(2, "cases_virtual.gradients_and_weights", hf=HF, layout=layout, folder=folder)
        held[name] = [rank["layers"] for rank in report]
    assert held == {"plain": [[[1, 2]], [[3, 4]]], "virtual": [[[1], [3]], [[2], [4]]]}
    plain, virtual = ([torch.load(tmp_path / name / f"{rank}.pt") for rank in range(2)] for name in held)
    before, after = ({k: v for rank in ranks for k, v in rank["gradients"].items()} for ranks in (plain, virtual))
    assert before.keys() == after.keys()
    assert sum(bool(gradient.any()) for gradient in before.values()) > len(before) / 2
    for place, gradient in before.items():
        assert (after[place] - gradient).norm() <= 1e-5 * gradient.norm(), place
    for kind in (0, 1):
        for rank in range(2):
            expected, found = plain[rank]["weights"][kind], virtual[rank]["weights"][kind]
            assert expected.keys() == found.keys()
            assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert plain[0]["factors"].keys() == virtual[0]["factors"].keys()
    for name, factor in plain[0]["factors"].items():
        assert torch.equal(factor, virtual[0]["factors"][name]), name


def test_the_direct_path_knows_where_layers_are(run_ranks) -> None:
    """Rectangles of every chunk, each element once, as the generic path exports them."""
    for result in run_ranks(2, "direct", hf=HF, layout=VPP2, engine_ranks=2, limit=100_000):
        assert result["wrong"] == 0
        assert result["elements"] == result["wanted"] > 400_000


def test_weights_merged_for_a_while_are_the_model(run_ranks) -> None:
    """Adapters and weights of all chunks; the pristine base must survive in all of them."""
    reports = run_ranks(2, "merged_in_place", hf=HF, layout=VPP2)
    for found in reports:
        assert found["moved"] > 10
        assert found["restored"], found
    assert reports[1]["difference"] < 1e-4 < 0.1 < reports[1]["learned"], reports


def test_random_weights_differ_from_layer_to_layer(run_ranks) -> None:
    """A chunk that draws what the one before it has drawn makes a model that repeats itself."""
    digests = run_ranks(2, "cases_virtual.drawn_layers", hf=HF, layout=VPP2)
    assert sorted(layer for rank in digests for layer in rank) == ["1", "2", "3", "4"]
    experts = {digest for rank in digests for found in rank.values() for digest in found}
    assert len(experts) == sum(len(found) for rank in digests for found in rank.values()) > 4


RUN = (
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=3 rollout.eval_samples=4 reward.name=function:letter_reward.vowels --micro-batch-size 2 "
    "--global-batch-size 8 --pipeline-model-parallel-size=2 --expert-model-parallel-size=1 --clip-grad=1e9"
).split()
VIRTUAL = "--num-layers-per-virtual-pipeline-stage=1"
VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank=2"


def records(folder: Path) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


def test_a_run_learns_the_same_and_resumes(run_ranks, tmp_path) -> None:
    """The whole loop: rollouts, direct path, reference logprobs, checkpoints of adapters in several chunks. A
    checkpoint is the model's and not a layout's: it is saved with virtual stages and loaded with and without. The fake
    engine samples from the weights' bits, so nothing but the norm may differ."""
    plain, whole, cut, other = (tmp_path / name for name in ("plain", "whole", "cut", "other"))
    assert run_ranks(2, "run", argv=[*RUN, f"log.run_dir={plain}"]) == ["", ""]
    assert run_ranks(2, "run", argv=[*RUN, VIRTUAL, f"log.run_dir={whole}"]) == ["", ""]
    save = [f"--save={tmp_path / 'checkpoint'}", "--save-interval=2"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "run", argv=[*RUN, VIRTUAL, f"log.run_dir={cut}", *save], kill_at=2)
    load = f"--load={tmp_path / 'checkpoint'}"
    assert run_ranks(2, "run", argv=[*RUN, VIRTUAL, f"log.run_dir={cut}", load]) == ["", ""]
    assert run_ranks(2, "run", argv=[*RUN, f"log.run_dir={other}", load]) == ["", ""]
    expected = records(plain)
    assert expected[2]["sync/update_norm"] > 0, "the run must learn something for the comparison to mean anything"
    for folder, first in ((whole, 0), (cut, 0), (other, 2)):
        found = records(folder)
        for iteration in range(first, 3):
            for name in ("train/loss", "train/grad_norm", "train/kl_ref", "rollout/reward", "sync/update_norm"):
                before, after = expected[iteration][name], found[iteration][name]
                assert after == pytest.approx(before, rel=1e-5, abs=1e-6), (folder.name, iteration, name)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([VIRTUAL, "--micro-batch-size=8"], "take the 1 micro-batches"),
        ([VIRTUAL, "--microbatch-group-size-per-virtual-pipeline-stage=3"], "in runs of 3"),
        (["--num-virtual-stages-per-pipeline-rank=3"], "does not divide the 4 layers"),
        ([VIRTUAL, "--no-overlap-p2p-communication"], "greater than 2"),
        ([VIRTUAL, "--pipeline-model-parallel-size=1"], "greater than 1"),
        ([VIRTUAL_STAGES, "--decoder-first-pipeline-num-layers=1"], "virtual pipeline"),
        (["--pipeline-model-parallel-layout=Et|t|t|tL"], "does not reach Megatron-Bridge"),
        ([VIRTUAL_STAGES, "--account-for-loss-in-pipeline-split"], "does not reach Megatron-Bridge"),
    ],
)
def test_what_cannot_work_is_refused_at_start(run_ranks, tmp_path, more, text) -> None:
    """Megatron finds these out in the first train step, or trains another layout than the one that was asked for."""
    for found in run_ranks(2, "run", argv=[*RUN, *more, f"log.run_dir={tmp_path}"]):
        assert found.startswith("ConfigError"), found
        assert text in found, found
