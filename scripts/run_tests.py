#!/usr/bin/env python3
"""All tests in two pytest sessions beside each other, tests/cpu_e2e and the rest: python scripts/run_tests.py

Each alone leaves a core idle by turns. The console shows the rest as it goes, and tests/cpu_e2e when both have ended.
Exit code 1 when one of them failed; both are interrupted when this process is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
BESIDE = "tests/cpu_e2e"
CLEAN_UP_S = 60.0
"""How long a session that is interrupted may take to end what it has started."""


def main() -> int:
    # SIGINT, too: a shell starts what runs in its background with that ignored, and the sessions would inherit it.
    came: list[int] = []
    on(lambda number, _frame: came.append(number))  # until both sessions are known, or one would be left
    with tempfile.TemporaryFile("w+") as log:
        sessions = [start([BESIDE], log), start([f"--ignore={BESIDE}"], None)]
        try:
            on(signal.default_int_handler)
            if came:
                raise KeyboardInterrupt
            codes = [session.wait() for session in reversed(sessions)]
        except KeyboardInterrupt:
            end(sessions)
            return 130
        log.seek(0)
        print(f"\n{BESIDE}, which ran beside that:\n{log.read()}", flush=True)
    return int(any(codes))


def on(handler: Callable[[int, Any], Any]) -> None:
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signals.append(signal.SIGHUP)  # a terminal that closes does not reach the sessions, either
    for sign in signals:
        signal.signal(sign, handler)


def start(arguments: list[str], log: IO[str] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log and subprocess.STDOUT,
        process_group=0,  # so that Ctrl-C reaches it once, from here
    )


def end(sessions: list[subprocess.Popen[bytes]]) -> None:
    for session in sessions:
        if session.poll() is None:
            session.send_signal(signal.SIGINT)
    for session in sessions:
        try:
            session.wait(CLEAN_UP_S)
        except subprocess.TimeoutExpired:
            os.killpg(session.pid, signal.SIGKILL)
            session.wait()


if __name__ == "__main__":
    sys.exit(main())
