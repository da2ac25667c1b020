"""A rank that is told to end does, with the code that shells expect, whatever its main thread is in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
BUSY = {
    "python": "print('in', flush=True)\nwhile True: time.sleep(0.1)",
    "c": """
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
print("in", flush=True)
lock(mutex)
""",
    "swallowed": """
print("in", flush=True)
while True:
    try:
        time.sleep(0.1)
    except BaseException:
        pass
""",
}


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    prelude = (
        "import ctypes, os, sys, time\nfrom megatron_sglang.training import ending\n"
        "ending.GRACE_S = 1.0\nending.watch()\nprint('up', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", process.communicate()
    return process


def until_in(process: subprocess.Popen[str]) -> None:
    """Until it says that it is where the test wants it; on a busy machine that takes seconds."""
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n", process.communicate()


REPORT = """
try:
    try:
        {before}
        raise OSError("the store is gone")
    except OSError as error:
        print("in", flush=True)
        sys.exit(ending.report(error, None))
except ending.Stopped as stopped:
    sys.exit(128 + stopped.signal)
"""


def test_the_end_of_torchrun_is_the_reason_of_an_error_before_it() -> None:
    """Of a torchrun that was killed the kernel closes the connections before it tells the ranks."""
    process = start(REPORT.format(before="pass"))
    until_in(process)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + signal.SIGHUP, "")


def test_torchruns_answer_does_not_hide_the_error() -> None:
    """It ends all ranks as soon as one has ended, and another rank may be faster than the one with the error."""
    process = start(REPORT.format(before="pass"))
    until_in(process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "the store is gone" in errors


def test_a_rank_lets_the_one_with_the_error_end_first(tmp_path: Path) -> None:
    """That one may still be closing its engine; torchrun, which ends all with the first, would cut it off."""
    code = """
from megatron_sglang.errors import EngineDiedError, OnOtherRank
try:
    raise EngineDiedError("gone") from OnOtherRank("rank 0 has it")
except EngineDiedError as error:
    print("in", flush=True)
    sys.exit(ending.report(error, None))
"""
    error_file = tmp_path / "error.json"
    process = start(code, TORCHELASTIC_RUN_ID="x", TORCHELASTIC_ERROR_FILE=str(error_file))
    until_in(process)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (1, "")
    assert "ended with another rank: EngineDiedError: gone" in error_file.read_text()
    alone = start(code)
    _, errors = alone.communicate(timeout=15)  # without torchrun nobody would end its wait of 30 s
    assert (alone.returncode, errors) == (1, "")


TOGETHER = """
from megatron_sglang.comm import Board
board = Board()
try:
    try:
        with ending.one_reason(board.one_error()):
            print("in", flush=True)
            {work}
    except Exception as error:
        sys.exit(ending.report(error, None))
except ending.Stopped as stopped:
    sys.exit(ending.report_stop(stopped))
"""


@pytest.fixture
def store() -> TCPStore:
    """In the place of torchrun's."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start_pair(store: TCPStore, folder: Path, leaders_work: str, others_work: str) -> list[subprocess.Popen[str]]:
    """Two ranks that share `store`; both are in their work. Their error files are in `folder`."""
    ranks = []
    for rank, work in enumerate((leaders_work, others_work)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
        ranks.append(
            start(TOGETHER.format(work=work), **environment, TORCHELASTIC_ERROR_FILE=str(folder / f"{rank}.json"))
        )
    for rank in ranks:
        until_in(rank)
    return ranks


def test_a_rank_that_is_stopped_is_the_reason_of_those_that_lose_it(store: TCPStore, tmp_path: Path) -> None:
    """Their collectives break, which nobody foresaw. The leader tells of the stop, though it hit another rank."""
    lost = f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)"
    lost += "\n            print('in', flush=True); raise RuntimeError('lost')"
    leader, other = start_pair(store, tmp_path, lost, "time.sleep(60)")
    other.send_signal(signal.SIGTERM)
    _, errors = other.communicate(timeout=20)
    assert (other.returncode, errors) == (128 + signal.SIGTERM, "")
    assert '"stopped by SIGTERM"' in (tmp_path / "1.json").read_text()
    (tmp_path / "go").touch()
    until_in(leader)
    time.sleep(0.5)
    leader.send_signal(signal.SIGTERM)  # torchrun has seen the other end
    _, errors = leader.communicate(timeout=20)
    assert (leader.returncode, errors) == (1, "stopped by SIGTERM\n")
    assert "ended with another rank: StoppedError: stopped by SIGTERM" in (tmp_path / "0.json").read_text()


def test_a_rank_that_is_stopped_for_the_error_of_another_is_silent(store: TCPStore, tmp_path: Path) -> None:
    """That one has said why the run ended; `stopped by SIGTERM` would be a second reason."""
    leader, other = start_pair(store, tmp_path, "time.sleep(60)", "raise ZeroDivisionError('a bug')")
    _, errors = other.communicate(timeout=20)
    assert (other.returncode, errors.splitlines()[0]) == (1, "rank 1: ZeroDivisionError: a bug")
    leader.send_signal(signal.SIGTERM)
    _, errors = leader.communicate(timeout=20)
    assert (leader.returncode, errors) == (128 + signal.SIGTERM, "")


def test_a_lost_rank_ended_before_the_error_that_comes_of_it(tmp_path: Path) -> None:
    """torchrun looks ten times a second, and takes the earliest time for the root cause."""
    began = time.time()
    start(REPORT.format(before="pass"), TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json")).communicate(timeout=20)
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "the store is gone" in told["message"]
    assert int(told["extraInfo"]["timestamp"]) > int(began) + 1


def test_a_signal_after_an_error_does_not_cut_off_the_closing(tmp_path: Path) -> None:
    """Nor does it take the error's place."""
    code = f"""
import contextlib
from megatron_sglang.errors import EngineDiedError
try:
    try:
        with ending.one_reason(contextlib.nullcontext()):
            raise EngineDiedError("gone")
    finally:
        print("in", flush=True)
        time.sleep(1.0)
        open({str(tmp_path / "closed")!r}, "w")
except EngineDiedError as error:
    sys.exit(ending.report(error, None))
"""
    process = start(code)
    until_in(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (1, "rank 0: EngineDiedError: gone\n")
    assert (tmp_path / "closed").exists()


def test_a_full_disk_is_said_wherever_it_was_met() -> None:
    """Whatever writes, Megatron's own output too: the error says no path, and does not look like one of the user's."""
    code = """
try:
    open("/dev/full", "w", buffering=1).write("a line\\n")
except OSError as error:
    sys.exit(ending.report(error, None))
"""
    process = start(code)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == (
        "rank 0: OSError: [Errno 28] No space left on device; a disk is full: make room for log.run_dir, --save and "
        "temporary files, and resume with --load\n"
    )


def test_a_signal_before_an_error_is_the_reason() -> None:
    """Also where a library has swallowed it: around an optional import there often is a bare `except`."""
    swallowed = "try:\n    print('in', flush=True); time.sleep(60)\nexcept BaseException: pass"
    before = "\n".join(8 * " " + line for line in swallowed.splitlines())
    process = start(REPORT.format(before=before.strip()))
    until_in(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_process(busy: str, number: signal.Signals) -> None:
    """A collective is C code that waits for a peer: Python's handlers do not run there."""
    process = start(BUSY[busy])
    until_in(process)
    time.sleep(0.3)  # until it is
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    if busy != "python":  # whose main thread ends by `Stopped`, which the caller reports
        assert errors == f"stopped by {number.name}, but not at an end after 1 s: ended\n"


def test_what_is_open_is_closed(tmp_path: Path) -> None:
    """A second Ctrl-C must not interrupt the cleaning up."""
    closing = f"time.sleep(0.5); open({str(tmp_path / 'closed')!r}, 'w')"
    patient = "ending.GRACE_S = 20.0\n"
    process = start(f"{patient}try:\n    print('in', flush=True); time.sleep(60)\nfinally:\n    {closing}")
    until_in(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert (tmp_path / "closed").exists()


def test_a_signal_to_a_fork_is_the_forks_own() -> None:
    """Forks inherit the descriptor through which the signal is noticed: one that is ended must not end us."""
    code = (
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n"
        "time.sleep(0.5); os.kill(child, 15); _, status = os.waitpid(child, 0)\n"
        "time.sleep(2); sys.exit(7 if os.WTERMSIG(status) == 15 else 8)"
    )
    assert start(code).wait(20) == 7


def test_a_rank_ends_with_its_torchrun() -> None:
    """After SIGKILL of torchrun nobody else tells its ranks."""
    code = (
        "import subprocess, sys, time\n"
        "sys.path.insert(0, 'tests/cpu_e2e')\n"
        "from test_ending import start\n"
        "rank = start('while True: time.sleep(0.1)', TORCHELASTIC_RUN_ID='x')\n"
        "print(rank.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait(5)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
