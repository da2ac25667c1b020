"""Training on multi-turn rollouts: the loss mask in real Megatron, and whole runs with the scriptable engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

MODEL = "examples/tiny_fim/model"
BASE = [
    *(
        "--config",
        "conf/tiny_cpu.yaml",
        "--rollout-engine",
        "fake",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
    ),
    *("rollout.prompts_per_batch=4", "rollout.samples_per_prompt=2", "rollout.batches=3", "rollout.eval_samples=2"),
    *("rollout.max_new_tokens=48", "rollout.dynamic_sampling=true", "reward.name=function:letter_reward.vowels"),
    "rollout.environment={name: 'count_environment:Count', turns: 2, max_turn_tokens: 16}",
]


@pytest.mark.parametrize("loss", ["gspo", "grpo"])
def test_the_loss_counts_sampled_tokens_only(run_ranks, loss):
    """Were observations trained, the model would learn to write error messages, and GSPO's ratio would be that of
    tokens nobody sampled."""
    layout = {"expert-model-parallel-size": 2}
    for found in run_ranks(2, "cases_agents.masked_loss", hf=MODEL, layout=layout, loss=loss):
        assert found["megatron"] == pytest.approx(found["by hand"], rel=2e-5)
        assert found["norm"] > 0


def argv(folder: Path, *more: str) -> list[str]:
    return [*BASE, f"log.run_dir={folder}", *more]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completes(run_ranks, folder: Path, *more: str, **case: object) -> list[dict]:
    ranks = run_ranks(2, "cases_failures.outcome", argv=argv(folder, *more), **case)
    assert [rank["code"] for rank in ranks] == [0, 0], ranks[0]["console"]
    assert not any(rank["left"] or rank["children"] for rank in ranks), ranks
    return records(folder)


@pytest.fixture(scope="module")
def undisturbed(run_ranks, tmp_path_factory) -> list[dict]:
    return completes(run_ranks, tmp_path_factory.mktemp("undisturbed"))


def test_a_multi_turn_run_that_was_killed_resumes_with_the_same_losses(run_ranks, tmp_path, undisturbed):
    """Turns, dynamic sampling and the place in the data come back; checkpoints hold the rollout's own state."""
    cut, saved = tmp_path / "cut", tmp_path / "checkpoint"
    save = [f"--save={saved}", "--save-interval=2"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "run", argv=argv(cut, *save), kill_at=2)
    state = json.loads((saved / "iter_0000002" / "rollout_state.json").read_text())
    assert state["cycle"]["rollout"] == {"groups": []}
    assert run_ranks(2, "run", argv=argv(cut, *save, f"--load={saved}")) == ["", ""]
    expected, found = ({record["iteration"]: record for record in run} for run in (undisturbed, records(cut)))
    assert list(found) == list(expected) == list(range(4))
    for iteration in range(3):
        assert expected[iteration]["rollout/turns"] == 2.0
        assert expected[iteration]["rollout/observed_tokens"] > 2
        for name in ("train/loss", "train/grad_norm", "rollout/reward", "rollout/tokens", "sync/update_norm"):
            assert found[iteration][name] == pytest.approx(expected[iteration][name], rel=1e-6), (iteration, name)


def test_an_engine_that_dies_amid_trajectories_costs_no_sample(run_ranks, tmp_path, undisturbed):
    """Some have a turn behind them, some groups are dropped: started again, the batch is the same. So it is with two
    engines behind sglang-router, which has to be told of the new one."""
    disturbed = completes(run_ranks, tmp_path / "cut", faults=[{"path": "/generate", "do": "die", "after": 30}])
    two = ("engine.tp_size=1", "--sglang-router-policy=manual")  # each of them gets about half of the requests
    routed = completes(run_ranks, tmp_path / "routed", *two, faults=[{"path": "/generate", "do": "die", "after": 18}])
    assert sum(record.get("engine/deaths", 0) for record in disturbed) >= 1
    assert sum(record.get("engine/deaths", 0) for record in routed) >= 1
    assert sum(record.get("engine/deaths", 0) for record in undisturbed) == 0
    same = ("rollout/turns", "rollout/reward", "rollout/tokens", "rollout/started_groups", "train/loss", "eval/reward")
    for name in same:
        wanted = [record.get(name) for record in undisturbed]
        assert [record.get(name) for record in disturbed] == wanted, name
        assert [record.get(name) for record in routed] == wanted, name


def test_what_older_weights_sampled_is_not_held_against_the_trainers(run_ranks, tmp_path):
    """Groups that were begun under the last version, and wait in the checkpoint, come first in a run that goes on with
    other options: without over-sampling, so that nothing in its own options speaks of them. Their tokens would end it,
    as an engine's that computes another function. The batch after it is of one version, and compared."""
    folder, save = tmp_path / "run", [f"--save={tmp_path / 'checkpoint'}", "--save-interval=2"]
    resume = ["rollout.dynamic_sampling=false", "rollout.stragglers=resume", "rollout.batches=4"]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, "run", argv=argv(folder, *save, *resume, "rollout.over_sampling=2"), kill_at=2)
    state = json.loads((tmp_path / "checkpoint" / "iter_0000002" / "rollout_state.json").read_text())
    assert len(state["cycle"]["rollout"]["groups"]) == 4
    more = [*save, *resume, f"--load={tmp_path / 'checkpoint'}", "rollout.over_sampling=1"]
    ranks = run_ranks(2, "cases_agents.compared", argv=argv(folder, *more))
    assert sum(value for name, value in records(folder)[2].items() if "tokens_lag" in name and name[-1] != "0") > 0
    assert ranks == [[False, True]] * 2
