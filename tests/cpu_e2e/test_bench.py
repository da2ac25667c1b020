"""`megatron-sglang bench sync` on two trainer ranks: the paths agree, and bytes and calls are those of the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cpu_e2e


def test_direct_beats_generic_at_equal_result(tmp_path: Path) -> None:
    """The command itself refuses other bits or other bytes than planned; here it must also be worth having."""
    binaries, output = Path(sys.executable).parent, tmp_path / "sync.json"
    command = [str(binaries / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command += [str(binaries / "megatron-sglang"), "bench", "sync", "--hf-model", "examples/tiny_fim/model"]
    command += ["--expert-model-parallel-size", "2", "--engine-tp", "2", "--dtype", "float32", "--lora-rank", "8"]
    command += ["--bucket-bytes", "1000000", "--syncs", "5", "--output", str(output)]
    command += ["--also-buckets", "300000", "--also-buffers", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["ranks"] == 2
    assert found["planned_bytes"] == found["paths"]["direct"]["bytes"] == 4_500_480
    assert found["paths"]["direct"]["buckets"] == 3
    assert found["direct_with_buckets"].keys() == {"300000"}
    counts = {size: path["buckets"] for size, path in found["direct_with_buffers"]["2"].items()}
    assert counts == {"1000000": 3, "300000": found["direct_with_buckets"]["300000"]["buckets"]}
    assert found["buffers"] == 1
    assert "fastest within 1000 MB: " in done.stderr, "nothing is on a device"
    assert found["generic_over_direct"] > 1.2, found["paths"]
    assert found["paths"]["stock"]["bytes"] == found["paths"]["generic"]["bytes"]
    # Bridge merges experts' adapters by their local numbers where they are split over ranks: every expert of the
    # second rank is wrong, by as much as an update changes it, and nothing else is.
    checked = found["weights_checker"]
    assert checked["generic_equals_direct"] is True
    assert checked["stock_equals_ours"] is False
    difference = checked["stock_difference"]
    assert difference["different"] == 4 * 4 * 3, difference
    assert all(".experts." in name for name in difference["first"])
    assert 0.5 < difference["largest"] / difference["largest_update"] < 3, difference
    before, after = found["held_first_and_last"]
    assert after["trainer_descriptors"] <= before["trainer_descriptors"]
    assert after["engine_descriptors"] <= before["engine_descriptors"]
