"""A whole run with real engines, and what it showed on its console."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import cases
import psutil

from megatron_sglang.engine.http_engine import HttpEngine


def shown(argv: list[str], kill_in: int | None = None) -> str:
    """What the run showed on this rank's console; AssertionError with its error. kill_in: call of `generate` of the
    second engine in which one of its ranks is killed."""
    console = io.StringIO()
    with contextlib.redirect_stdout(console), _killing(kill_in):
        error = cases.run(argv)
    assert not error, error
    return console.getvalue()


@contextlib.contextmanager
def _killing(kill_in: int | None) -> Iterator[None]:
    original, calls = HttpEngine.generate, itertools.count(1)

    def generate(self: HttpEngine, requests: Any) -> Any:
        if (self.options.log_path or "").endswith("1.log") and next(calls) == kill_in:
            threading.Timer(0.1, _kill_rank, [self]).start()
        return original(self, requests)

    HttpEngine.generate = generate  # type: ignore[method-assign]
    try:
        yield
    finally:
        HttpEngine.generate = original  # type: ignore[method-assign]


def _kill_rank(engine: HttpEngine) -> None:
    children = psutil.Process(engine.server.pid).children(recursive=True)
    next(child for child in children if "scheduler" in "".join(child.cmdline())).kill()
