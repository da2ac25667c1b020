"""`make test` without arguments: two sessions of pytest, and what becomes of either."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_tests.py"
TESTS = {"cpu_e2e": "tests/cpu_e2e/test_beside.py", "unit": "tests/unit/test_shown.py"}


def start(root: Path, **bodies: str) -> subprocess.Popen[str]:
    """The script in a repository of one test in each session."""
    (root / "scripts").mkdir()
    shutil.copy(SCRIPT, root / "scripts")
    for tier, path in TESTS.items():
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(f"import time\n\ndef test_{tier}():\n    {bodies[tier]}\n")
    return subprocess.Popen(
        [sys.executable, root / "scripts" / SCRIPT.name],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they are most of a start
        text=True,
    )


@pytest.mark.parametrize(
    ("unit", "cpu_e2e", "code"), [("pass", "pass", 0), ("assert 0", "pass", 1), ("pass", "assert 0", 1)]
)
def test_either_session_fails_the_whole_and_both_are_shown(tmp_path: Path, unit: str, cpu_e2e: str, code: int) -> None:
    """The session whose end nobody waits for at the console must count as much."""
    script = start(tmp_path, unit=unit, cpu_e2e=cpu_e2e)
    shown, _ = script.communicate(timeout=60)
    assert script.returncode == code
    words = ["failed" if body != "pass" else "passed" for body in (unit, cpu_e2e)]
    assert re.findall(r"1 (passed|failed) in", shown) == words, shown


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("count", "sign"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGHUP)])
def test_the_end_of_the_script_ends_both_sessions(tmp_path: Path, count: int, sign: signal.Signals) -> None:
    """What a cancelled run, or one whose terminal was closed, leaves behind holds the two cores of the next one. Also
    while it starts the second."""
    script = start(tmp_path, unit="time.sleep(100)", cpu_e2e="time.sleep(100)")
    deadline = time.monotonic() + 30
    while len(sessions := psutil.Process(script.pid).children()) < count or any(
        "pytest" not in session.cmdline() for session in sessions
    ):
        assert time.monotonic() < deadline, sessions
        time.sleep(0.001)
    script.send_signal(sign)
    script.communicate(timeout=150)  # a session that imports may lose the signal, and is killed after 60 s
    assert script.returncode == 130
    assert not psutil.wait_procs(sessions, 5)[1]
