"""A whole run with real engines, and what it showed on its console."""

from __future__ import annotations

import contextlib
import io

import cases


def shown(argv: list[str]) -> str:
    """What the run showed on this rank's console; AssertionError with its error."""
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        error = cases.run(argv)
    assert not error, error
    return console.getvalue()
