"""How far a conversion is, and how fast: a bar with bytes per second on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator


def is_leader() -> bool:
    """Is this torchrun's rank 0? Known before the ranks have met; True without torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def progress(text: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields what is told of bytes that were dealt with; shown by the leader, on stderr.

    total, done: bytes of the whole, and what of it was there before. The rate counts what came since.
    """
    from tqdm import tqdm

    stream = sys.__stderr__ or sys.stderr  # past the redirection of what Megatron prints
    with_bar = is_leader() and stream.isatty()
    started, moved = time.monotonic(), 0
    bar = tqdm(
        desc=text,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        file=stream,
        dynamic_ncols=True,
        disable=not with_bar,
    )

    def advance(nbytes: int) -> None:
        nonlocal moved
        moved += nbytes
        bar.update(nbytes)

    with bar:
        yield advance
    if is_leader() and not with_bar:
        seconds = time.monotonic() - started
        rate = tqdm.format_sizeof(moved / max(seconds, 1e-9), "B/s")
        before = f", {tqdm.format_sizeof(done, 'B')} were there" if done else ""
        print(f"{text}: {tqdm.format_sizeof(moved, 'B')} in {seconds:.1f} s, {rate}{before}", file=stream, flush=True)
