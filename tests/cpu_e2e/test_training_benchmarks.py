"""The benchmarks that drive the plugin's own train step without an engine: nothing else calls it like that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--config", "conf/tiny_cpu.yaml", "model.random_weights=true", "engine.tp_size=1", "data.max_prompt_tokens=72"]
SMALL += ["rollout.prompts_per_batch=4", "rollout.max_new_tokens=16", "--expert-model-parallel-size=1"]
SMALL += ["--global-batch-size=32", "--micro-batch-size=8"]
RECOMPUTE = ["--layers", "4", "1", "--tokens", "512", "--steps", "1"]
EFFICIENCY = ["--rounds", "1", "--warm-up", "0"]


def measured(tmp_path: Path, script: str, arguments: list[str]) -> dict:
    output = tmp_path / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launcher, f"benchmarks/{script}", *SMALL, *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_a_step_with_more_and_fewer_layers_recomputed(tmp_path: Path) -> None:
    """In one process. 32 samples of 88 tokens, five to a micro-batch."""
    found = measured(tmp_path, "recompute.py", RECOMPUTE)
    assert [one["layers_recomputed"] for one in found["settings"]] == [4, 1]
    for one in found["settings"]:
        assert one["micro_batches"] == 7
        assert len(one["seconds_of_a_step"]["each"]) == 1
        assert one["tokens_per_s"] > 0


def test_our_step_beside_plain_megatrons(tmp_path: Path) -> None:
    found = measured(tmp_path, "training_efficiency.py", EFFICIENCY)
    assert found["rounds"] == 1
    assert found["ours_over_plain"] == pytest.approx(
        found["seconds_of_a_step"]["plain"]["median"] / found["seconds_of_a_step"]["ours"]["median"]
    )
    assert set(found["tokens_per_s"]) == {"ours", "plain"}
