"""Handlers of signals, for a while. Standard library only: scripts import it on a host where nothing is installed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


def not_ignored(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those of `numbers` that this process does not ignore. What is ignored before anyone has a handler is so because
    someone wants it: nohup starts a command with SIGHUP ignored, a shell one in its background with SIGINT."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals) -> Iterator[None]:
    """Inside, `handler` has these signals; then they are again as before. In the main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
