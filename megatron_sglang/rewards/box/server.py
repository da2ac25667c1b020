"""A fork server: one warm, idle process per box; every job is a fork of it that dies with all it started.

    driver -> server   "J" with the job's channels attached, then the job as a frame; at any time "S": stop it
    server -> driver   {"ready": true} | {"failed": reason} once; per job {"started": pid}, {"ended": status}

It answers `ended` when the job has returned, was stopped or is over its time, and everything it left is killed and
deleted. It ends when its driver does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import sysconfig
import time
from typing import Any, NoReturn

from megatron_sglang.rewards.box import jail, seccomp, tasks
from megatron_sglang.rewards.box.literals import JOB_BYTES, ChannelError, receive, send

POLL_S = 0.005  # a pidfd would do without, where there is one; a stop is noticed at once anyway
TASKS = {"solve": tasks.solve, "judge": tasks.judge}
# Imported once, before the forks; each library more makes a fork slower. Others are imported by the job itself.
WARM = ["collections.abc", "copy", "functools", "heapq", "itertools", "math", "random", "re", "string", "typing"]
WARM_FOR_TIER = {
    "restricted": ["megatron_sglang.rewards.box.restricted"],
    # Its jobs are nobody's on the real file system, where nobody may be unable to read root's Python.
    "unsafe-local": [
        *("array", "base64", "bisect", "calendar", "cmath", "csv", "dataclasses", "datetime", "decimal", "difflib"),
        *("encodings.idna", "enum", "fractions", "hashlib", "numbers", "operator", "pprint", "queue", "secrets"),
        *("statistics", "textwrap", "threading", "time", "timeit", "unicodedata", "uuid", "zlib"),
    ],
}


def main(control_fd: int, options: dict[str, Any]) -> None:
    """Set up the box (`tier`, `filter`, `limits` in options), then serve jobs until the driver hangs up."""
    control = socket.socket(fileno=control_fd)
    try:
        for name in [*WARM, *WARM_FOR_TIER.get(options["tier"], [])]:
            importlib.import_module(name)
        _enter(control, options["tier"], options["limits"])
        options["filter"] = seccomp.program(os.uname().machine) if options["filter"] and seccomp.supported() else b""
    except (jail.JailError, OSError) as error:
        send(control, {"failed": str(error)}, JOB_BYTES)
        return
    memory = options["limits"]["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))  # of this process, for `compare`, and of each job
    os.environ.pop("PYTHONHASHSEED", None)  # it has done its work: sets iterate alike in every box
    os.dup2(1, 2)  # nobody reads any more
    gc.collect()
    gc.freeze()
    send(control, {"ready": True, "filter": bool(options["filter"])}, JOB_BYTES)
    while _serve(control, options):
        pass


def _enter(control: socket.socket, tier: str, limits: dict[str, Any]) -> None:
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    sys.path[:] = [stdlib, os.path.join(stdlib, "lib-dynload")]
    if tier == "namespaces":
        jail.unshare(control)
        jail.build_root([stdlib], limits["tmp_mb"])
        jail.drop_privileges()
        os.chdir("/tmp")
    elif tier == "bubblewrap":
        jail.drop_privileges()
    else:
        jail.fork_under_guard(control)
        jail.prctl(jail.SUBREAPER, 1)


def _serve(control: socket.socket, options: dict[str, Any]) -> bool:
    """One job; False when the driver is gone."""
    byte, fds, _, _ = socket.recv_fds(control, 1, 2)
    if byte != b"J":
        return byte == b"S"  # it crossed with our `ended`
    job = receive(control, JOB_BYTES)
    if job["task"] == "compare":
        _compare(control, job, fds, options["limits"]["message_bytes"])
        return True
    alone = os.getpid() == 1
    folder = "/tmp" if alone else _private_folder()
    child = os.fork()
    if child == 0:
        _run(job, fds, folder, options)
    for fd in fds:
        os.close(fd)
    send(control, {"started": child}, JOB_BYTES)
    in_time = _wait(child, control, options["limits"]["wall_s"])
    status = _end_all(child) if alone else _end_descendants(child)
    _empty(folder)
    if not alone:
        os.rmdir(folder)
    send(control, {"ended": status if in_time else "killed"}, JOB_BYTES)
    return True


def _wait(child: int, control: socket.socket, wall_s: float) -> bool:
    """Until the job has ended, must stop, or is over its time; whether it had ended."""
    deadline = time.monotonic() + wall_s
    while time.monotonic() < deadline and not _has_ended(child):
        if select.select([control], [], [], POLL_S)[0]:  # a stop, or the driver is gone
            break
    return _has_ended(child)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _compare(control: socket.socket, job: dict[str, Any], fds: list[int], limit: int) -> None:
    """Tests that are literals run no code, so they need no process of their own: half of a job's time saved."""
    send(control, {"started": 0}, JOB_BYTES)
    calls, verdicts = (socket.socket(fileno=fd) for fd in fds)
    with calls, verdicts, contextlib.suppress(ChannelError):
        tasks.judge(job, [calls, verdicts], limit)
    send(control, {"ended": ""}, JOB_BYTES)


def _private_folder() -> str:
    import tempfile  # not in a namespace, and its imports make forks slower

    return tempfile.mkdtemp(prefix="megatron-sglang-box-")


def _end_all(child: int) -> str:
    """As process 1: kill every other process, in one step that no fork bomb outruns; how `child` ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    status = ""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, raw = os.waitpid(-1, 0)
            status = _status(raw) if pid == child else status
    return status


def _end_descendants(child: int) -> str:
    """Outside a namespace: kill what descends from us (we inherit orphans) until nothing does; how `child` ended."""
    status = ""
    while pids := _children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            raw = os.waitpid(pid, 0)[1]
            status = _status(raw) if pid == child else status
    return status


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _status(raw: int) -> str:
    code = os.waitstatus_to_exitcode(raw)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _empty(folder: str) -> None:
    for _, folders, files, fd in os.fwalk(folder, topdown=False):
        for name in (*files, *folders):
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=fd)


def _run(job: dict[str, Any], fds: list[int], folder: str, options: dict[str, Any]) -> NoReturn:
    """The forked child: give up what it must not have, then do the task."""
    limits, code = options["limits"], 1
    try:
        _close_all_but(fds)
        channels = [socket.socket(fileno=fd) for fd in fds]
        if folder != "/tmp":
            _leave(folder)
        _limit(limits)
        if options["filter"] and job["task"] == "solve":  # tests are trusted
            seccomp.install(options["filter"])
        TASKS[job["task"]](job, channels, limits["message_bytes"])
        code = 0
    except ChannelError:
        code = 0
    finally:
        os._exit(code)


def _leave(folder: str) -> None:
    """What namespaces do otherwise: part from the server's session, user and files as far as that goes."""
    os.setsid()
    os.environ.update(HOME=folder, TMPDIR=folder)
    os.chdir(folder)
    with contextlib.suppress(OSError, jail.JailError):  # root of a rootless container cannot become anybody else
        os.chown(folder, jail.NOBODY, jail.NOBODY)
        jail.become_nobody()
    jail.prctl(jail.PDEATHSIG, signal.SIGKILL)


def _close_all_but(fds: list[int]) -> None:
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 16)


def _limit(limits: dict[str, Any]) -> None:
    for name, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),  # SIGXCPU first: it tells time from other ends
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["tmp_mb"] << 20, limits["tmp_mb"] << 20),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(name, (soft, hard))
