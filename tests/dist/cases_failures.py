"""One rank of a run that shall fail: pretrain_gspo.py's `main`, and what it left behind."""

from __future__ import annotations

import dataclasses
import gc
import io
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from cases import training
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

import pretrain_gspo
from megatron_sglang.training import checkpoint, run

Outcome = dict[str, Any]


def outcome(
    argv: list[str], faults: list[dict[str, Any]] | None = None, port: int | None = None, break_at: int | None = None
) -> Outcome:
    """Exit code, console text, seconds, and what was left: child processes, files in the temporary folder.

    faults: the fake engine's script. port: where the ranks are told to meet. break_at: Megatron iteration at which
    rank 1 fails in a way nobody foresaw.
    """
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # rank 0 opens it
    original_options, original_step = run.engine_options, training.train_step

    def options(config: Any) -> Any:
        return dataclasses.replace(original_options(config), extra={"faults": faults or []})

    def step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        if iteration == break_at and os.environ["RANK"] == "1":
            raise ZeroDivisionError("a bug")
        return original_step(*args, iteration=iteration, **kwargs)

    # The signature is what the plugin checks.
    step.__wrapped__ = original_step  # type: ignore[attr-defined]
    run.engine_options, training.train_step = options, step
    with tempfile.TemporaryDirectory(prefix="failing") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        started = time.monotonic()
        code, console = _main(argv, Path(folder).parent / f"console.{os.getpid()}")
        signal.alarm(0)
        if torch.distributed.is_initialized():  # the end of the process would do it
            torch.distributed.destroy_process_group()
        found = {"code": code, "console": console, "seconds": time.monotonic() - started}
        return found | {"left": os.listdir(folder), "children": _children()}


def failed_writes() -> str:
    """Checkpoint files that cannot be written, and the collection of what that leaves behind."""
    checkpoint.write_in_process()
    item = WriteItem(MetadataIndex("state"), WriteItemType.BYTE_IO)
    transforms = [_StorageWriterTransforms()]
    for _ in range(20):
        bucket = ("/dev/full", "key", ([(item, io.BytesIO(bytes(100_000)))], []))
        written = filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, None, None, False)
        found = repr(written)
        del written
        gc.collect()
    return found


def _main(argv: list[str], console: Path) -> tuple[int, str]:
    """`main` with its console in a file; C++ writes past sys.stderr, so the descriptors are what is replaced."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with console.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.argv = ["pretrain_gspo.py", *argv]
            code = pretrain_gspo.main()
            sys.stdout.flush()
            sys.stderr.flush()
        return code, console.read_text()
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        console.unlink(missing_ok=True)


def _children() -> list[str]:
    gone = time.monotonic() + 10
    while (found := psutil.Process().children(recursive=True)) and time.monotonic() < gone:
        time.sleep(0.1)
    return [" ".join(process.cmdline()) for process in found if process.is_running()]
