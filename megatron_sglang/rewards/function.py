"""A user's reward function, called in worker processes with a deadline.

The function gets a `Prompt` and a `Completion` and returns a finite number. It is trusted, but its faults must not
hang or end a training run without a word: one that raises, hangs or returns no number is a `RewardError`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.rewards.box import jail
from megatron_sglang.rewards.box.literals import ChannelError, receive, send
from megatron_sglang.types import Completion, Prompt, Score

MESSAGE_BYTES = 64 << 20
IMPORT_S = 120.0  # the user's module may import a large library


class FunctionReward:
    """`Score.value` is what the function returns; `passed` if that is at least 1.

    Raises `ConfigError` at once if "package.module.function" cannot be imported.
    """

    def __init__(self, path: str, *, workers: int, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._workers = [_Worker(path) for _ in range(workers)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        try:
            list(self._threads.map(_Worker.start, self._workers))
        except ConfigError:
            self.close()
            raise

    @property
    def tier(self) -> str:
        """For the log."""
        return f"function {self._path} in {len(self._workers)} worker processes, not sandboxed"

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """Scores in the order of `pairs`; `RewardError` names the function, the prompt and what went wrong."""
        return list(self._threads.map(self._score, pairs))

    def close(self) -> None:
        """End the workers. Idempotent."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _score(self, pair: tuple[Prompt, Completion]) -> Score:
        prompt, completion = pair
        worker = self._free.get()
        try:
            value = worker.call(prompt, completion, self._timeout_s)
        except ChannelError as error:
            worker.close()
            late = str(error) == "timeout"
            what = f"gave no answer in {self._timeout_s:g} s" if late else f"ended its process ({error})"
            remedy = "correct it, or raise reward.timeout_s" if late else "correct it"
            raise RewardError(f"reward function {self._path} {what} for prompt {prompt.id!r}; {remedy}") from None
        except RewardError as error:
            what = f"failed for prompt {prompt.id!r}: {error}; correct it"
            raise RewardError(f"reward function {self._path} {what}") from None
        finally:
            self._free.put(worker)
        return Score(value, passed=value >= 1.0)


class _Worker:
    """One process with the function in it; started again when it has been closed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._channel = socket.socket()

    def start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(IMPORT_S)
        code = f"import sys; sys.path[:] = {sys.path!r}; from megatron_sglang.rewards.function import serve; serve()"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), self._path],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            answer = receive(self._channel, MESSAGE_BYTES)
        except ChannelError as error:
            answer = {"error": f"importing it gave no result: {error}"}
        if "error" in answer:
            self.close()
            raise ConfigError(
                f"reward function {self._path}: {answer['error']}; expected package.module.function, with the folder "
                "that holds it on PYTHONPATH"
            )

    def call(self, prompt: Prompt, completion: Completion, timeout_s: float) -> float:
        if self._process is None:
            self.start()
        self._channel.settimeout(timeout_s)
        plain = replace(completion, routed_experts=None)  # megabytes that no reward looks at
        send(self._channel, {"prompt": asdict(prompt), "completion": asdict(plain)}, MESSAGE_BYTES)
        answer = receive(self._channel, MESSAGE_BYTES)
        if "error" in answer:
            raise RewardError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._channel.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # with what the function has started, such as a checker
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def serve() -> None:
    """The worker process: argv is a socket's number and the function's path; ends when the socket does."""
    jail.prctl(jail.PDEATHSIG, signal.SIGKILL)  # even in the middle of a call that hangs
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        module, _, name = sys.argv[2].rpartition(".")
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is not callable")
    except Exception as error:  # noqa: BLE001 - a process boundary
        send(channel, {"error": _last_line(error)}, MESSAGE_BYTES)
        return
    send(channel, {"ready": True}, MESSAGE_BYTES)
    with contextlib.suppress(ChannelError):
        while True:
            send(channel, _answer(function, receive(channel, MESSAGE_BYTES)), MESSAGE_BYTES)


def _answer(function: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        prompt, completion = request["prompt"], request["completion"]
        for record in (prompt, completion):
            record.update({key: tuple(value) for key, value in record.items() if key.endswith("_T")})
        value = float(function(Prompt(**prompt), Completion(**completion)))
    except Exception as error:  # noqa: BLE001 - a process boundary
        return {"error": _last_line(error)}
    if not math.isfinite(value):
        return {"error": f"it returned {value}, expected a finite number"}
    return {"value": value}


def _last_line(error: Exception) -> str:
    """What was raised, and the line of the function's own file that it came through last."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{text} ({Path(frames[0].filename).name}:{lines[-1]})" if lines else text


def _ours(filename: str) -> bool:
    """Whether a frame is of this file, or of Python's import."""
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen")
