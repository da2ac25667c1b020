"""The process above all others of a backend: `python -m megatron_sglang.art.keeper`. Standard library and psutil.

    stdin    {"start": "trainer", "argv": [...], "environment": {...}, "cwd": "...", "log": "...", "remove": [...],
              "held": [file descriptors that it inherits]}
    stdout   {"started": "trainer", "pid": 4711}   {"ended": "trainer", "code": 1}

One JSON object a line. When its parent is gone (stdin at its end, or another parent) or on SIGTERM it asks its
children to end (SIGTERM), gives them `GRACE_S`, and what they leave behind `ORPHANS_S`, kills all that is left,
removes the files that were named, and exits. When it is killed itself the kernel sends its children SIGTERM.
Environments come through stdin: argv is readable.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

GRACE_S = 45.0
"""More than torchrun gives its ranks (30 s)."""

ORPHANS_S = 3.0
_KILL_S = 20.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None)


def main() -> int:
    """Keep until asked to end."""
    keeper = Keeper()
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, keeper.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes us
    keeper.keep()
    keeper.end()
    return 0


class Keeper:
    """The children, by name."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.files: list[str] = []
        """What is removed at the end."""
        self.stopped = False

    def stop(self, *_: object) -> None:
        self.stopped = True

    def keep(self) -> None:
        """Obey commands and report ends until there is no reason to go on."""
        pending = b""
        while not self.stopped and os.getppid() == self.parent:
            self.reap()
            if not select.select([0], [], [], 0.2)[0]:
                continue
            part = os.read(0, 1 << 16)
            if not part:
                return
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                self.start(json.loads(line))

    def start(self, command: dict[str, Any]) -> None:
        """Start a child in a session of its own, its output appended to its log."""
        name = command["start"]
        self.files += command["remove"]
        with open(os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            child = subprocess.Popen(
                command["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=command["environment"],
                cwd=command["cwd"],
                start_new_session=True,
                preexec_fn=_end_with_parent,
                pass_fds=command["held"],
            )
        self.children[name] = child
        _say({"started": name, "pid": child.pid})

    def reap(self) -> None:
        """Report children that have ended; bury orphans."""
        while (dead := _peek()) is not None:
            name = next((name for name, child in self.children.items() if child.pid == dead), None)
            if name is None:
                os.waitpid(dead, 0)
            else:
                _say({"ended": name, "code": self.children.pop(name).wait()})

    def end(self) -> None:
        """Nothing of ours runs when this returns."""
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        self._wait(GRACE_S, lambda: not self.children)
        # An engine's supervisor that has lost its trainer ends its server and removes its folder.
        self._wait(ORPHANS_S, lambda: not psutil.Process().children())
        deadline = time.monotonic() + _KILL_S
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.reap()
            time.sleep(0.05)
        for path in self.files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _wait(self, seconds: float, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.reap()
            if over():
                return
            time.sleep(0.05)


def _peek() -> int | None:
    """Pid of a child that has ended, still to be waited for."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found else None


def _say(event: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, which `keep` notices
        os.write(1, json.dumps(event).encode() + b"\n")


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
