"""One blocking call to the engine beside the main thread, with a deadline for its result."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from megatron_sglang.errors import EngineTimeoutError


class Background[T]:
    """Runs `work` in a daemon thread at once. The file `over` appears when it has ended, whatever came of it: for other
    processes, which wait for what `work` lets happen."""

    def __init__(self, work: Callable[[], T], over: Path) -> None:
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._over = over
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

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

    def _run(self, work: Callable[[], T]) -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001  it belongs to whoever asks for the result
            self._mark()
            self._future.set_exception(error)
        else:
            self._mark()
            self._future.set_result(value)

    def _mark(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the engine was closed, and its folder is gone
            self._over.touch()
