"""Supervisor of an engine: `python -m megatron_sglang.engine.launch <listener fd>`, the spec as one JSON line on stdin.

It stays tiny (no torch, no SGLang), forks the server and then does one thing: when the trainer is gone (stdin at
EOF, or another parent), on SIGTERM, or when the server ends, it kills every descendant, orphans included, removes what
they left in /dev/shm (`segments.py`), and exits; without a trainer it also removes the engine's folder. Keys come
through stdin: argv and environment are readable.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_sglang.engine import segments

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
KILL_TIMEOUT_S = 20.0


def main() -> int:
    trainer = os.getppid()
    spec = json.loads(sys.stdin.readline())
    listener = socket.socket(fileno=int(sys.argv[1]))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    shared = segments.Segments(Path(spec["folder"]))
    server = os.fork()
    if server == 0:
        _run_server(spec, listener)
    listener.close()
    ending = _supervise(server, trainer, shared)
    _kill_descendants()
    segments.remove(Path(spec["folder"]))
    if ending == "orphaned":
        shutil.rmtree(spec["folder"], ignore_errors=True)
    return 1 if ending == "died" else 0


def _run_server(spec: dict[str, Any], listener: socket.socket) -> None:
    """In the fork: become the server. Never returns."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _hide_megatron()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        importlib.import_module(spec["module"]).serve(spec, listener)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Exception:  # noqa: BLE001  process boundary: the log is the only place it can go
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hide_megatron() -> None:
    """SGLang imports megatron.core where there is one, for a dump that nobody asks for (debug_utils/dumper.py:1810).
    That would switch torch_memory_saver to a mode that cannot release CUDA graphs (megatron/core/inference/contexts/
    dynamic_context.py:72), which ends an engine with SGLANG_MEMORY_SAVER_CUDA_GRAPH=1; and a Transformer Engine that
    cannot be imported would end any."""
    modules: dict[str, Any] = sys.modules
    modules["megatron"] = None


def _supervise(server: int, trainer: int, shared: segments.Segments) -> Literal["orphaned", "asked", "died"]:
    """Wait until the trainer is gone, asks for the end, or the server ends by itself."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while not stop:
        readable, _, _ = select.select([0], [], [], 0.2)
        shared.look()
        if os.getppid() != trainer or (readable and not os.read(0, 4096)):
            return "orphaned"
        while (ended := _reap()) > 0:
            if ended == server:
                print(f"engine supervisor: the server process {server} ended by itself", file=sys.stderr, flush=True)
                return "died"
    return "asked"


def _kill_descendants() -> None:
    """SIGKILL until nothing is left; as subreaper we inherit whatever the server leaves behind."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        while (ended := _reap()) > 0:
            pass
        if ended < 0:
            return
        time.sleep(0.02)


def _reap() -> int:
    """Pid of one ended child; 0 when all are running, -1 when there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return -1


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__mp_main__":  # SGLang's ranks are spawned by the server, which runs this file again
    _hide_megatron()
if __name__ == "__main__":
    sys.exit(main())
