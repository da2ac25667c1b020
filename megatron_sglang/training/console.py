"""The console belongs to the progress lines; what Megatron and its imports print goes to a file for each rank."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_sglang.errors import ConfigError


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Callable[[str], None]]:
    """Send this process's Python output, log records, warnings, and the traceback of an error to `log`; yields a print
    to the real console. What an earlier run of the folder wrote stays above a line. `ConfigError` if the file cannot be
    written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", buffering=1)
        if file.tell():
            file.write(f"\n======== started again {time.strftime('%Y-%m-%d %H:%M:%S')} ========\n")
    except OSError as error:
        raise ConfigError(
            f"log.run_dir={log.parent} cannot be written to: {error.strerror}; name another folder"
        ) from error
    console = sys.stdout

    def show(line: str) -> None:
        print(line, file=console, flush=True)

    with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        try:
            yield show
        except Exception:
            with contextlib.suppress(OSError):
                traceback.print_exc(file=file)
            raise
        finally:
            logging.root.removeHandler(handler)


@contextlib.contextmanager
def loud() -> Iterator[Callable[[str], None]]:
    """Everything on the console, as Megatron does it."""
    yield lambda line: print(line, flush=True)
