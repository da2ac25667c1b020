"""Where a checkpoint lies, and its JSON part. Standard library only: a conversion asks before it imports Megatron.

<save>/iter_0000030/            Megatron: adapters, optimizer, schedule, RNG
<save>/iter_0000030/rollout_state.json    position in the data, weight version, rollout step, its train steps done;
                                the adapters' options and their dtype
<save>/release/                 in its place, of a conversion: adapters, and of the JSON part their options and dtype
<save>/latest_checkpointed_iteration.txt  Megatron writes it last; until then the checkpoint does not count
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_sglang.errors import DataError

STATE_FILE = "rollout_state.json"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint that is nobody's iteration: loaded without optimizer, schedule and RNG."""


def newest(root: str | Path) -> str:
    """The last checkpoint in `root`: an iteration's number, or `RELEASE`. Raises OSError where there is none."""
    return Path(root, TRACKER).read_text().strip()


def folder_of(root: str | Path, which: int | str) -> Path:
    """Of an iteration, or of `RELEASE`, in `root`."""
    return Path(root, f"iter_{int(which):07d}" if str(which).isdecimal() else str(which))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the JSON part, of a run before Megatron's part: no checkpoint counts without it. On one rank only."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (STATE_FILE + ".part")
    with partial.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / STATE_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part; DataError when the checkpoint has none."""
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); the checkpoint is not of this package or is damaged, "
            "load an earlier one with --ckpt-step"
        ) from error
