"""scripts/check_demo.py: what passes for a run that has learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("gaps", "status"), [((1e-6, 2e-6), 0), ((1e-6, 1e-3), 1), ((1e-6, "nan"), 1), (("nan", 1e-6), 1)]
)
def test_a_gap_that_is_no_number_is_a_failure(tmp_path: Path, gaps: tuple[float | str, ...], status: int) -> None:
    """A NaN in any step; the largest of several numbers may pass over it."""
    rates = [{"eval/pass_rate": 0.2, "train/kl_ref": 0.0}, {"eval/pass_rate": 0.6}]
    rows = [{"iteration": step, "train/logprob_gap_max": gap, **rates[step]} for step, gap in enumerate(gaps)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "scripts" / "check_demo.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == status, done.stdout + done.stderr
