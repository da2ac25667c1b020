"""The console belongs to the progress lines; what Megatron and its imports print goes to a file for each rank."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Callable[[str], None]]:
    """Send this process's Python output, log records and warnings to `log`; yields a print to the real console."""
    log.parent.mkdir(parents=True, exist_ok=True)
    console = sys.stdout

    def show(line: str) -> None:
        print(line, file=console, flush=True)

    with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        try:
            yield show
        finally:
            logging.root.removeHandler(handler)


@contextlib.contextmanager
def loud() -> Iterator[Callable[[str], None]]:
    """Everything on the console, as Megatron does it."""
    yield lambda line: print(line, flush=True)
