"""How a rank ends: by a signal, together with torchrun, by an error. Standard library only, to be in force at once.

    SIGINT, SIGTERM, SIGHUP   raise `Stopped` in the main thread, so that everything is closed; exit code 128 + signal
    torchrun is killed        the kernel sends SIGHUP
    an error                  one rank says it on the console and all of them to torchrun, which repeats it at its end;
                              it ends first, since torchrun ends all of them with the first
    both                      what came first is the reason; a signal to any rank is told by rank 0

A rank that does not end within `GRACE_S` (its main thread may sit in a collective, or a library it imports may have
swallowed `Stopped`) is ended; its engine and its reward workers notice by themselves. With Megatron's
--exit-signal-handler SIGTERM is Megatron's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_sglang.errors import MegatronSglangError, Stopped, StoppedError, is_from_other_rank

GRACE_S = 10.0
FOLLOWS_S = 2.0
"""Within which the kernel's signal follows what it did before: of a torchrun that was killed it closes the connections,
and a rank may find its store gone before it hears why."""
CLOSES_S = 30.0
"""Within which a rank with an error has closed its engine and said why, so that the others may end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_came: list[int] = []
"""The signal that ends this process, if one does. `Stopped` alone is not enough: what is imported may swallow it."""
_late: list[int] = []
"""Signals that came after an error, and change nothing: torchrun's answer to the first rank that ended."""


def watch() -> None:
    """Take over the signals of this process, not of its forks. Call it first, in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _stop)
    if _under_torchrun():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
    # Python runs handlers between bytecodes only; the wakeup descriptor is written to even while C code blocks.
    seen, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_enforce, args=(seen, written), daemon=True, name="ending").start()
    os.register_at_fork(after_in_child=_unwatch)


@contextlib.contextmanager
def one_reason(one_error: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Around a run's work, inside of what closes it: the reason of its end is what came first, for the other ranks too,
    which `one_error` tells. An error after a signal comes of it; a signal after an error does not cut the closing off.
    """
    try:
        with one_error:
            try:
                yield
            except Exception as error:
                if _came:
                    raise Stopped(_came[0]) from error
                raise
    except Exception:
        _only_note()
        raise


def report(error: Exception, log: Path | None, *, shared: bool = False) -> int:
    """Say what ended the run; the exit code. Silent on ranks that only share another one's error.

    log: file with the traceback; None: show the traceback of an error that nobody foresaw.
    shared: another rank reports it; so it is too where the error is of another rank.

    Raises:
        Stopped: a signal came before the error, or the end of torchrun is what the error comes from.
    """
    text, rank = f"{type(error).__name__}: {error}", os.environ.get("RANK", "0")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full:
        text += "; a disk is full: make room for log.run_dir, --save and temporary files, and resume with --load"
    shared = shared or is_from_other_rank(error)
    if _came:
        raise Stopped(_came[0]) from error
    _only_note()  # other ranks may have ended by the same error, and torchrun tells this one
    foreseen = full or isinstance(error, MegatronSglangError)
    unforeseen_anywhere = not foreseen or type(error) is MegatronSglangError
    if shared and _under_torchrun():  # nobody else would end the wait
        _wait_for(SIGNALS, CLOSES_S)
    elif unforeseen_anywhere:
        _wait_for([signal.SIGHUP], FOLLOWS_S)
    if unforeseen_anywhere and signal.SIGHUP in _late:
        raise Stopped(signal.SIGHUP) from error
    _end_undisturbed()
    if not shared:
        lines = [f"rank {rank}: {text}"]
        if not foreseen:
            lines.append("nobody foresaw this error; if a rank was lost, its end is the cause and this the consequence")
            lines += [] if log else [traceback.format_exc()]
        lines += [f"traceback: {log}"] if log and log.exists() else []
        print("\n".join(lines), file=sys.stderr, flush=True)
    elif isinstance(error, StoppedError) and rank == "0":
        print(error, file=sys.stderr, flush=True)
    # torchrun takes the earliest for the cause: of a rank that was lost its own end, which it has seen meanwhile.
    _tell_torchrun(f"ended with another rank: {text}" if shared else text, time.time() + (GRACE_S if shared else 0))
    return 1


def report_stop(stopped: Stopped) -> int:
    """Say which signal ended the run, on the leader, if no other rank has said why it came; the exit code."""
    if os.environ.get("RANK", "0") == "0" and not stopped.follows:
        print(stopped, file=sys.stderr)
    _tell_torchrun(str(stopped), time.time())  # it may have hit this rank alone
    return 128 + stopped.signal


def _wait_for(numbers: Sequence[int], at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while not set(numbers) & set(_late) and time.monotonic() < deadline:
        time.sleep(0.05)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _tell_torchrun(text: str, unix_s: float) -> None:
    """What torch.distributed.elastic's ErrorHandler writes, with the message where it has the traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(unix_s))}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def _stop(number: int, _frame: Any) -> NoReturn:
    _came.append(number)
    _end_undisturbed()
    raise Stopped(number)


def _only_note() -> None:
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: _late.append(number))


def _enforce(seen: socket.socket, _written: socket.socket) -> None:
    while True:
        number = seen.recv(1)[0]
        # Of a signal after an error torchrun itself sees to it, unless it has gone.
        if number == signal.SIGHUP or (number in SIGNALS and signal.getsignal(number) in (_stop, signal.SIG_IGN)):
            time.sleep(GRACE_S)
            if os.environ.get("RANK", "0") == "0":
                text = f"stopped by {signal.Signals(number).name}, but not at an end after {GRACE_S:.0f} s: ended\n"
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, text.encode())  # not print: the main thread may hold the stream
            os._exit(128 + number)


def _end_undisturbed() -> None:
    """No further signal interrupts the cleaning up. If it hangs, in libraries' exit code too, the kernel ends us."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(round(GRACE_S) + 5)


def _unwatch() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
