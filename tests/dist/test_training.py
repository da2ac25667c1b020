"""Whole runs in Megatron's loop with the scriptable engine: resume, divergence, errors on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BASE = (
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=6 rollout.eval_samples=4 reward.name=function:letter_reward.vowels "
    "--micro-batch-size 2 --global-batch-size 8"
).split()

ALONE = ("--expert-model-parallel-size=1", "engine.tp_size=1")


def argv(folder: Path, *more: str) -> list[str]:
    return [*BASE, f"log.run_dir={folder}", *more]


def records(folder: Path) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


def rollouts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_with_the_same_losses(run_ranks, tmp_path):
    """SIGKILL between two iterations must cost nothing but the time since the last save: adapters, optimizer, RNG, data
    position and weight version come back."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(2, "run", argv=argv(whole)) == ["", ""]
    save = [f"--save={tmp_path / 'checkpoint'}", "--save-interval=2"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "run", argv=argv(cut, *save), kill_at=5)
    resumed = argv(cut, *save, f"--load={tmp_path / 'checkpoint'}")
    assert run_ranks(2, "run", argv=resumed) == ["", ""]
    expected, found = records(whole), records(cut)
    assert expected[5]["sync/update_norm"] > 0, "the run must learn something for the comparison to mean anything"
    assert list(found) == list(expected) == list(range(7))
    for iteration in range(6):
        for name in ("train/loss", "train/grad_norm", "rollout/reward", "sync/version", "sync/update_norm"):
            assert found[iteration][name] == pytest.approx(expected[iteration][name], rel=1e-6), (iteration, name)


def test_a_run_that_was_saved_amid_a_rollout_batch_takes_its_prompts_again(run_ranks, tmp_path):
    """Megatron saves when it likes. The train steps that the batch still owed must not be left out, nor the numbers of
    batches and iterations part."""
    steps = ["--global-batch-size=4", "rollout.batches=3"]  # two to a batch
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(2, "run", argv=argv(whole, *steps)) == ["", ""]
    save = [*steps, f"--save={tmp_path / 'checkpoint'}", "--save-interval=3"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "run", argv=argv(cut, *save), kill_at=4)
    resumed = argv(cut, *save, f"--load={tmp_path / 'checkpoint'}")
    assert run_ranks(2, "run", argv=resumed) == ["", ""]
    assert list(records(cut)) == list(records(whole)) == list(range(4))
    prompts = [[(r["iteration"], r["prompt_id"]) for r in rollouts(folder)] for folder in (whole, cut)]
    assert prompts[0] == prompts[1]
    assert [found[1]["train/tokens"] > 0 for found in (records(whole), records(cut))] == [True, True]
    assert run_ranks(2, "run", argv=resumed) == ["", ""], "nothing is left to train, and Megatron saves at its end"


def test_a_resume_with_other_numbers_of_train_steps_is_refused(run_ranks, tmp_path):
    """Megatron goes on at its iteration: of three rollout batches the third would not be, without a word."""
    save = [f"--save={tmp_path / 'checkpoint'}", "--save-interval=2", "rollout.batches=3", *ALONE]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, "run", argv=argv(tmp_path / "run", *save, "--global-batch-size=4"), kill_at=3)
    resumed = argv(tmp_path / "run", *save, f"--load={tmp_path / 'checkpoint'}", "--global-batch-size=8")
    (error,) = run_ranks(1, "run", argv=resumed)
    assert "has had 2 train steps for 1 rollout batches, this run has 1 for each" in error, records(tmp_path / "run")


def test_nothing_of_a_train_step_stays_in_memory(run_ranks, tmp_path):
    """Megatron's token dispatchers would keep the input of every recomputed layer, and its gradient, over the rollout:
    8 GB of Qwen3-30B-A3B."""
    recompute = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    (left,) = run_ranks(1, "cases_training.graphs_left", argv=argv(tmp_path, *recompute, "rollout.batches=2", *ALONE))
    assert left == [0, 0]


def test_old_logprobs_of_the_first_train_step_are_the_policys_own(run_ranks, tmp_path):
    """Nothing has changed since the batch was sampled: a forward pass for them would tell nothing new."""
    steps = ["--global-batch-size=4", "--micro-batch-size=2", "rollout.batches=2", "algo.kl_coef=null", *ALONE]
    for name, all_steps in (("left_out", False), ("all", True)):
        (counts,) = run_ranks(1, "cases_training.scored", argv=argv(tmp_path / name, *steps), all_steps=all_steps)
        assert counts == [2, 2], "one of two train steps of two micro-batches"
    left_out, every = records(tmp_path / "left_out"), records(tmp_path / "all")
    for iteration in range(2):
        for key in ("train/loss", "train/grad_norm", "train/kl_old", "train/ratio", "train/clip_fraction"):
            assert left_out[iteration][key] == pytest.approx(every[iteration][key], rel=1e-4, abs=1e-7), (
                iteration,
                key,
            )


def test_old_logprobs_of_merged_weights_are_those_of_what_was_sampled_from(run_ranks, tmp_path):
    """In bf16 a merged weight is rounded once more than a weight and its adapter; the engine has the merged one."""
    given = ["model.dtype=bfloat16", "--lr=0.03", "--min-lr=0.03", *ALONE]  # an adapter that tells in bf16
    found = {}
    for name in ("adapters", "merged"):
        steps = ["rollout.batches=3", f"algo.old_logprobs={name}"]
        assert run_ranks(1, "run", argv=argv(tmp_path / name, *given, *steps)) == [""]
        found[name] = records(tmp_path / name)[2]["train/kl_old"]
    assert found["adapters"] == 0.0, "they are the policy's own"
    assert found["merged"] > 0.0


def test_a_record_says_what_an_update_changed_and_what_rounding_lost(run_ranks, tmp_path):
    given = ["model.dtype=bfloat16", "rollout.batches=2", *ALONE]
    assert run_ranks(1, "run", argv=argv(tmp_path, *given)) == [""]
    first, second = (records(tmp_path)[step] for step in (0, 1))
    assert first["sync/changed"] == first["sync/update_norm"] == 0.0, "B is 0 before anything was trained"
    assert 0.0 < second["sync/cast_loss"] <= 1.5
    assert 0.0 <= second["sync/changed"] < 1.0
    layers = [second[f"sync/update_norm/layer_{layer}"] for layer in range(4)]
    assert sum(norm**2 for norm in layers) == pytest.approx(second["sync/update_norm"] ** 2, rel=1e-6)
    assert all(second[f"sync/cast_loss/layer_{layer}"] > 0.0 for layer in range(4))


def test_checkpoints_hold_adapters_and_not_the_base(run_ranks, tmp_path):
    """A save that rewrites the frozen base costs 61 GB on the real model."""
    import torch.distributed.checkpoint as dcp

    save = [f"--save={tmp_path / 'checkpoint'}", "--save-interval=1", "rollout.batches=1"]
    assert run_ranks(2, "run", argv=argv(tmp_path / "run", *save)) == ["", ""]
    folder = tmp_path / "checkpoint" / "iter_0000001"
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = [name for name in names if name.endswith(".weight") and not name.startswith("optimizer")]
    assert weights
    assert all(".adapter." in name for name in weights), weights
    assert json.loads((folder / "rollout_state.json").read_text())["rollout_step"] == 1


def test_a_step_that_is_not_finite_is_skipped(run_ranks, tmp_path):
    """One NaN gradient must not reach the weights; the next step goes on from where it was."""
    run_dir = tmp_path / "run"
    assert run_ranks(2, "run", argv=argv(run_dir, "rollout.batches=4"), bad_steps=[1]) == ["", ""]
    found = records(run_dir)
    assert found[2]["sync/update_norm"] == found[1]["sync/update_norm"]
    assert found[3]["sync/update_norm"] > found[2]["sync/update_norm"]


def test_many_steps_that_are_not_finite_end_the_run_on_all_ranks(run_ranks, tmp_path):
    """A diverged run must stop with the reason on every rank, not hang or go on forever."""
    for text in run_ranks(2, "run", argv=argv(tmp_path / "run"), bad_steps=[1, 2, 3]):
        assert text.startswith("DivergedError: 3 train steps in a row"), text
    assert max(records(tmp_path / "run")) == 3


def test_several_train_steps_per_rollout_batch(run_ranks, tmp_path):
    """With two steps a batch, the second is off-policy: its ratios must differ from 1, the first's must not."""
    more = ["--global-batch-size=4", "rollout.batches=3", "rollout.temperature=0.7"]
    assert run_ranks(2, "run", argv=argv(tmp_path / "run", *more)) == ["", ""]
    assert all(record["train/kl_old"] > 0 for step, record in records(tmp_path / "run").items() if step < 3)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (
            ["--tensor-model-parallel-size=2", "--expert-tensor-parallel-size=2"],
            "adapters of experts are wrong above 1",
        ),
        (["--seq-length=64"], "seq-length"),
        (["--context-parallel-size=2", "--expert-model-parallel-size=1"], "no context parallelism"),
        (["--overlap-grad-reduce", "--overlap-param-gather"], "from before the step"),
        (["--moe-z-loss-coeff=0.5"], "--moe-z-loss-coeff=0.5 has no effect here"),
        (["--num-layers=3"], "--num-layers=3 has no effect here"),
        (["--moe-aux-loss-coeff=0.01"], "--moe-aux-loss-coeff=0.01 has no effect here"),
        (["--moe-router-bias-update-rate=0.5"], "--moe-router-bias-update-rate=0.5 has no effect here"),
        (["--norm-epsilon=0.1"], "--norm-epsilon=0.1 has no effect here"),
        (["megatron.use-distributed-optimizer=false"], "megatron.use-distributed-optimizer=false has no effect here"),
        (["--optimizer-cpu-offload", "--use-precision-aware-optimizer"], "here they are float32 on a CPU"),
        (["model.hf_path=/nonexistent"], "has no config.json"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(run_ranks, tmp_path, layout, text):
    """Megatron or Bridge would accept these and be wrong, or fail far from the cause."""
    for found in run_ranks(2, "run", argv=argv(tmp_path / "run", *layout)):
        assert text in found, found
