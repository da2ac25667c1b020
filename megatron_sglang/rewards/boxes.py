"""The driver's end of a box: start one fork server (`box/server.py`) in a sandbox tier, give it jobs, end it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_sglang.errors import SandboxError
from megatron_sglang.rewards.box.literals import JOB_BYTES, ChannelError, framed, receive

Tier = Literal["bubblewrap", "namespaces", "restricted", "unsafe-local"]
PACKAGE = Path(__file__).parents[1]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "PYTHONHASHSEED": "0"}
START_S = 30.0  # a start takes 0.2 s on an idle machine
ANSWER_S = 10.0  # the server kills, reaps and deletes before it answers
END_S = 5.0


class BoxDied(Exception):
    """The box ended before it had started the job, through no fault of the job."""


class Box:
    """One fork server. Not thread-safe; jobs run one after the other. Restarted when it is found dead."""

    def __init__(self, tier: Tier, limits: Mapping[str, Any], *, use_filter: bool) -> None:
        self._options = {"tier": tier, "limits": dict(limits), "filter": use_filter}
        self._process: subprocess.Popen[bytes] | None = None
        self._control = socket.socket()
        self._unsettled = False
        self.filtered = False
        """Whether system calls of the jobs are filtered; known after `start`."""

    def start(self) -> None:
        """Bring the server up; `SandboxError` names the step that was refused."""
        self.close()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_S)
        with theirs:
            self._process = subprocess.Popen(
                _command(self._options, theirs.fileno()),
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # until it is ready
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        try:
            answer = receive(self._control, JOB_BYTES)
        except ChannelError as error:
            answer = {"failed": f"its server did not come up: {error}"}
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            if "failed" in answer:
                self.close()
                reason = f"{answer['failed']} {stderr.read(1000).decode(errors='replace')[-300:]}".strip()
                raise SandboxError(f"sandbox tier {self._options['tier']!r} does not work here: {reason}")
        self.filtered = bool(answer["filter"])

    def submit(self, job: Mapping[str, Any], channels: Sequence[socket.socket]) -> None:
        """Hand over a job and its ends of sockets, without waiting; `BoxDied` if nobody takes it, `TooLarge` if it
        cannot travel."""
        frame = framed(job, JOB_BYTES)
        self.settle()
        if self._process is None:
            self.start()
        self._control.settimeout(self._options["limits"]["wall_s"] + ANSWER_S)
        try:
            socket.send_fds(self._control, [b"J"], [channel.fileno() for channel in channels])
            self._control.sendall(frame)
        except OSError as error:
            self.close()
            raise BoxDied(str(error)) from None
        self._unsettled = True

    def stop(self) -> None:
        """Ask for the end of the job, without waiting; `settle` tells how it ended."""
        if self._unsettled:
            with contextlib.suppress(OSError):
                self._control.sendall(b"S")

    def settle(self) -> str:
        """Wait until the job and all it started are gone; how it ended. `BoxDied` if it never began."""
        if not self._unsettled:
            return ""
        self._unsettled = False
        began = False
        try:
            began = "started" in receive(self._control, JOB_BYTES)
            return receive(self._control, JOB_BYTES)["ended"]
        except ChannelError as error:
            self.close()
            if began:
                return f"brought its sandbox down: {error}"
            raise BoxDied(str(error)) from None

    def close(self) -> None:
        """End the server and all it runs. Idempotent."""
        self._unsettled = False
        self._control.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)  # it ends when its control socket does
            process.kill()
            process.wait()


def _command(options: Mapping[str, Any], control: int) -> list[str]:
    inside = options["tier"] == "bubblewrap"
    folder = "/box" if inside else str(PACKAGE.parent)
    server = (
        f"import sys; sys.path.insert(0, {folder!r}); from megatron_sglang.rewards.box.server import main; "
        f"main({control}, {options!r})"
    )
    python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", server]
    return [*_bubblewrap(options["limits"]["tmp_mb"]), *python] if inside else python


def _bubblewrap(tmp_mb: int) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("sandbox tier 'bubblewrap' does not work here: no bwrap on PATH; install bubblewrap")
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    python = os.path.realpath(sys.executable)
    libraries = [sysconfig.get_config_var("LIBDIR") or "/usr/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    ours = ["__init__.py", "errors.py", "rewards/__init__.py", "rewards/box"]
    arguments = [program, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--as-pid-1"]
    arguments += ["--die-with-parent", "--cap-drop", "ALL", "--ro-bind", python, python]
    for path in dict.fromkeys(libraries):
        arguments += ["--ro-bind-try", path, path]
    arguments += ["--ro-bind", stdlib, stdlib]
    if os.path.isdir(f"{stdlib}/site-packages"):
        arguments += ["--tmpfs", f"{stdlib}/site-packages"]
    for path in ours:
        arguments += ["--ro-bind", str(PACKAGE / path), f"/box/megatron_sglang/{path}"]
    return [*arguments, "--size", str(tmp_mb << 20), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
