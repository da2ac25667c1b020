"""For all tests: tiers by folder, cheap ones first, a deadline for each, and no process left behind.

tests/unit needs nothing; tests/dist, tests/cpu_e2e and tests/gpu are marked after their folder. GPU tests are skipped
where there is no device. Whatever a test starts inherits MEGATRON_SGLANG_TEST; what still runs under it when the
session ends is named, ended, and fails the session.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks share few cores
SESSION_MARK = f"MEGATRON_SGLANG_TEST={uuid.uuid4()}"
os.environ.update([SESSION_MARK.split("=")])

import hypothesis  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
DEADLINE_S = {"unit": 120, "dist": 420, "cpu_e2e": 600, "gpu": 600}
"""Tier -> longest time of one test, in the order in which the tiers run."""


# Every run draws the same examples, so what is red once is red again, and has no clock, which a busy machine would not
# keep. New examples: --hypothesis-profile default
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers = list(DEADLINE_S)
    for item in items:
        tier = _tier(item)
        if tier != "unit":
            item.add_marker(tier)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(DEADLINE_S[tier]))
        if tier == "gpu" and not Path("/dev/nvidiactl").exists():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: tiers.index(_tier(item)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    leftovers = list(_left_running())
    for process, command in leftovers:
        print(f"\nleft running by the tests: {process.pid} {command[:160]}")
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process.kill()
    if leftovers:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def repository_files() -> list[Path]:
    """All files of the repository as they would be committed now."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: what belongs to the repository is not known")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _tier(item: pytest.Item) -> str:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    return folder if folder in DEADLINE_S else "unit"


def _left_running(patience_s: float = 15.0) -> Iterator[tuple[psutil.Process, str]]:
    """Processes and their command lines: those with this session's mark that do not end within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (found := list(_marked())) and time.monotonic() < deadline:
        time.sleep(0.2)
    yield from found


def _marked() -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            command = " ".join(process.cmdline())
            helper = "multiprocessing.resource_tracker" in command
            if process.pid != os.getpid() and not helper and SESSION_MARK.encode() in environment:
                yield process, command
        except (OSError, psutil.Error):
            continue  # it has just ended, or is another user's
