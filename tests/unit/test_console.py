"""Where a rank's output goes while the console belongs to the progress lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sglang.training import console


def crash(log: Path) -> None:
    with console.quiet(log):
        raise ZeroDivisionError("a bug")


def test_a_run_that_is_taken_up_again_keeps_the_traceback_of_its_end(tmp_path: Path) -> None:
    """It is restarted first and looked at afterwards."""
    log = tmp_path / "run" / "rank0.log"
    with pytest.raises(ZeroDivisionError):
        crash(log)
    assert "started again" not in log.read_text()
    with console.quiet(log):
        print("second")
    before, _, after = log.read_text().partition("======== started again ")
    assert "ZeroDivisionError: a bug" in before
    assert after.endswith("second\n")
