"""Two ranks of Megatron with two real SGLang engines, one beside each, against the same run with one engine of TP 2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BASE = [
    *("--config", "conf/tiny_cpu.yaml", "rollout.batches=2", "rollout.samples_per_prompt=4", "data.eval="),
    *("reward.name=function:letter_reward.vowels", "--micro-batch-size", "16", "log.trackers=[]"),
]


def test_an_engine_that_computes_something_else_ends_the_run(run_ranks, tmp_path: Path) -> None:
    """Every weight arrives bit for bit, and the tokens are sampled from another model all the same."""
    other = ['sglang.json_model_override_args=\'{"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}\'']
    argv = [*BASE, *other, f"log.run_dir={tmp_path}", "engine.tp_size=1", "--expert-model-parallel-size=1"]
    (error,) = run_ranks(1, "run", timeout_s=300, argv=argv)
    assert error.startswith("WeightSyncError: the engine's logprobs of its own tokens differ from the trainer's"), error


def test_several_engines_train_as_one_does(run_ranks, tmp_path: Path) -> None:
    """Other samples than one engine's would mean that a seed, a weight or the order was lost on the way. One of the
    several is killed while it generates: it must come back with the weights that it had, and the batch be the same."""
    runs = {}
    for tp_size in (1, 2):
        folder = tmp_path / f"tp{tp_size}"
        argv = [*BASE, f"log.run_dir={folder}", f"engine.tp_size={tp_size}"]
        kill_in = 2 if tp_size == 1 else None
        console = run_ranks(2, "cases_engines.shown", timeout_s=300, argv=argv, kill_in=kill_in)[0]
        found = re.findall(r"the direct path, .* engine digest \w{16}, (.*)", console)
        assert found == ["as by the generic path", "by the plan that was compared"][: 2 if kill_in else 1], console
        assert ("2 engines sglang tp=1" in console) == (tp_size == 1), console
        samples = (folder / "rollouts.jsonl").read_text()
        assert samples.count("\n") == 2 * 16 * 4
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert sum(record.get("engine/deaths", 0) for record in records) == (tp_size == 1), console
        trained = [record for record in records if "train/loss" in record]
        assert len(trained) == 2
        assert trained[1]["sync/update_norm"] > 0, "the second batch must be sampled from other weights"
        assert max(record["train/logprob_gap_max"] for record in trained) < 1e-4
        runs[tp_size] = samples, [record["sync/update_norm"] for record in records]
    assert runs[1][0] == runs[2][0], "texts, rewards and weight versions of every sample"
    assert runs[1][1] == pytest.approx(runs[2][1], rel=1e-6)
