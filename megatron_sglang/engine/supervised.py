"""The trainer's end of `launch.py`: a server on a port of its own, under a supervisor that ends with the trainer."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CLOSE_TIMEOUT_S = 30.0


def start(
    python: str, spec_of: Callable[[int], Mapping[str, Any]], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen[str], int]:
    """Spawn and return at once: the supervisor, whose pid is that of its process group, and the server's port.

    spec_of: port -> what `launch.py` is told. log: where the output of all of them is appended.
    """
    # Bound here and handed down, so nobody can take the port while the server is starting.
    with socket.socket() as listener, log.open("a") as output:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        spec = json.dumps(spec_of(port))
        process = subprocess.Popen(
            [python, "-P", "-m", "megatron_sglang.engine.launch", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            text=True,
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: who waits for the server says why
        process.stdin.write(spec + "\n")
        process.stdin.flush()
    return process, port


def end(process: subprocess.Popen[str]) -> bool:
    """End supervisor and server, and wait; False where the supervisor had to be killed. The server dies with it, and
    SGLang's children with the server (PR_SET_PDEATHSIG)."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    obeyed = True
    try:
        process.wait(CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        obeyed = False
        process.kill()
        process.wait(CLOSE_TIMEOUT_S)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    return obeyed
