"""Files that only this user may read, and that nobody reads by halves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Inside, a new file of mode 0600 beside `path`, in whose place it is put at the end; an error leaves `path` as it
    was. Not for two threads at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
