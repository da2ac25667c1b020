"""The endpoint's API key: read from a file or the environment, or made and put into a file; never in argv or a log."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from megatron_sglang.errors import ConfigError
from megatron_sglang.private_file import replacing

VARIABLE = "MEGATRON_SGLANG_API_KEY"
SHORTEST = 16


def from_user(path: Path | None) -> str | None:
    """The key that the user has set: the first line of `path`, or without a path the variable's; None: one is to be
    made, and written to `path` where that is named.

    ConfigError for a key that can be guessed, or a file that others can read.
    """
    if path is not None and path.exists():
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(f"{path} can be read by others (mode {mode:o}); chmod 600 it, and change the key")
        return _checked((path.read_text().splitlines() or [""])[0], str(path))
    if path is None and (given := os.environ.get(VARIABLE)) is not None:
        return _checked(given, f"${VARIABLE}")
    return None


def make(path: Path) -> str:
    """A random key, written to `path` with mode 0600; of a file that is there, which is ours, it is replaced."""
    key = secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            file.write(key + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another --api-key-file") from error
    return key


def remove(path: Path, key: str) -> None:
    """The file of `make`, unless it holds the key of another endpoint by now, on another address or machine."""
    with contextlib.suppress(OSError):
        if path.read_text() == key + "\n":
            path.unlink()


def _checked(key: str, where: str) -> str:
    key = key.strip()
    if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the API key in {where} has {len(key)} characters; expected at least {SHORTEST} of printable ASCII "
            "without spaces; `openssl rand -hex 32` makes one"
        )
    return key
