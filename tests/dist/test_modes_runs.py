"""The demo's first two batches as whole runs in other modes, on real SGLang: the samples are those of colocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BASE = ["--config", "conf/tiny_cpu.yaml", "rollout.batches=2", "data.eval=", "log.trackers=[]"]
COLOCATED = [0.377, 0.412]
"""Rewards of the first two batches of the demo (README.md), whose second is sampled from weights that were trained."""

MODES = {
    "split, broadcast, router": (
        2,
        ["--rollout-mode=split", "sync.method=broadcast", "engine.tp_size=1", "--sglang-router-policy=manual"],
        "router: sglang-router, manual, in front of 2 engines",
    ),
    "split, direct": (
        1,
        ["--rollout-mode=split", "engine.tp_size=2", "sync.method=direct"],
        "not compared with the generic path",
    ),
    "shared": (1, ["--rollout-mode=shared", "engine.tp_size=1"], "rollout mode: shared"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_another_mode_samples_what_the_colocated_one_does(run_ranks, tmp_path: Path, mode: str) -> None:
    """Seeds belong to requests: another reward, or a gap from trainer to engine, is a weight that did not arrive."""
    ranks, options, says = MODES[mode]
    argv = [*BASE, *options, f"--expert-model-parallel-size={ranks}", f"log.run_dir={tmp_path}"]
    console = run_ranks(ranks, "cases_engines.shown", timeout_s=300, argv=argv)[0]
    assert says in console, console
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    batches = [record for record in records if "train/loss" in record]
    assert [round(record["rollout/reward"], 3) for record in batches] == COLOCATED
    assert max(record["train/logprob_gap_max"] for record in batches) < 1e-5
    assert batches[1]["sync/update_norm"] > 0
    assert [record["sync/version"] for record in records] == [1, 2, 3], "each batch its own, and the last"
