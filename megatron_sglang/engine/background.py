"""Blocking calls to engines beside the main thread: one with a deadline for its result, or one to each of several.

In daemon threads: those of a pool are waited for at the interpreter's end, and an interrupted trainer must end at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sglang.errors import EngineTimeoutError


def in_thread[T](work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Runs `work` at once; its value or error is the future's."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001  it belongs to whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(value)

    threading.Thread(target=run, daemon=True).start()
    return future


def side_by_side[T](
    works: Sequence[Callable[[], T]], *, until_first_error: bool = False
) -> list[concurrent.futures.Future[T]]:
    """Runs all at the same time until all have ended, each by its own deadline. until_first_error: or one has failed;
    the others then go on unheard."""
    futures = [in_thread(work) for work in works]
    until = concurrent.futures.FIRST_EXCEPTION if until_first_error else concurrent.futures.ALL_COMPLETED
    concurrent.futures.wait(futures, return_when=until)
    return futures


class Background[T]:
    """Runs `work` in a daemon thread at once. The file `over` appears when it has ended, whatever came of it: for other
    processes, which wait for what `work` lets happen."""

    def __init__(self, work: Callable[[], T], over: Path) -> None:
        self._work, self._over = work, over
        self._future = in_thread(self._run)

    def result(self, timeout_s: float) -> T:
        """Its value, or the error it raised; `EngineTimeoutError` at the deadline. The file is gone afterwards."""
        try:
            return self._future.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            if self._future.done():
                raise
            raise EngineTimeoutError(f"the engine did not end its stream within {timeout_s:g} s; restart it") from error
        finally:
            self._over.unlink(missing_ok=True)

    def _run(self) -> T:
        try:
            return self._work()
        finally:
            with contextlib.suppress(FileNotFoundError):  # the engine was closed, and its folder is gone
                self._over.touch()
