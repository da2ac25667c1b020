"""How benchmarks start whole runs: nothing of a run may outlive the benchmark that was waiting for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TORCHRUN = """
import os, signal, subprocess, sys
rank = subprocess.Popen(["sleep", "100"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
try:
    print(os.getpid(), rank.pid, file=open(sys.argv[1], "w"))
    rank.wait()
finally:
    rank.terminate()
    rank.wait()
"""
"""In its place: what it starts is in a session of its own, and hears of a signal by it alone."""

BENCHMARK = f"""
import pathlib, signal, sys
from concurrent.futures import ThreadPoolExecutor
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever tests in a shell's background has it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path[:0] = [{str(BENCHMARKS)!r}]
from launch import interruptible, launch
at_once, timeout_s, *marks = sys.argv[1:]
def run(mark):
    return launch([sys.executable, "-c", {TORCHRUN!r}, mark], timeout_s=int(timeout_s)).returncode
with interruptible():
    if at_once == "1":
        print(*map(run, marks))
    else:
        with ThreadPoolExecutor(int(at_once)) as pool:
            print(*pool.map(run, marks))
"""


def start(at_once: int, timeout_s: int, marks: list[Path]) -> subprocess.Popen[str]:
    """A benchmark of one run for each mark, a file in which the run writes its processes."""
    arguments = [str(at_once), str(timeout_s), *map(str, marks)]
    return subprocess.Popen(
        [sys.executable, "-c", BENCHMARK, *arguments], stdout=subprocess.PIPE, text=True, process_group=0
    )


def processes(mark: Path) -> list[psutil.Process]:
    """Of a run, which has started: what stands for torchrun, and for its rank."""
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text().endswith("\n")):
        assert time.monotonic() < deadline, mark
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for pid in mark.read_text().split()]


def outlived(found: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; they are ended then."""
    left = psutil.wait_procs(found, 3)[1]
    for process in left:
        process.kill()
    return left


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_a_benchmark_ends_its_runs(tmp_path: Path, at_once: int, sign: signal.Signals) -> None:
    """In the main thread, and from a pool whose threads no signal interrupts. Ctrl-C goes to the terminal's processes,
    where `timeout` left torchrun out, so that it trained on, or was waited for until its deadline."""
    marks = [tmp_path / str(number) for number in range(3)]
    benchmark = start(at_once, 60, marks)
    started = [process for mark in marks[:at_once] for process in processes(mark)]
    os.killpg(benchmark.pid, sign)
    try:
        benchmark.communicate(timeout=15)
    finally:
        benchmark.kill()
        left = outlived(started)
    assert not left
    assert benchmark.returncode == 128 + sign
    assert not any(mark.exists() for mark in marks[at_once:])


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The next one has its turn, and what is measured beside a leftover is worth nothing."""
    mark = tmp_path / "mark"
    benchmark = start(1, 3, [mark])
    said, _ = benchmark.communicate(timeout=30)
    assert said.strip() == "124"
    assert not [pid for pid in mark.read_text().split() if psutil.pid_exists(int(pid))]
