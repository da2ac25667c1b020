"""What SGLang leaves in /dev/shm when its processes are killed, as they always are: whose it is, and its removal.

Queues between ranks, `sgl_shm_<kind>_<pid>_<random>`, belong to the process that made them: the supervisor notes those
that its descendants have mapped, while they live. The figures of a scheduler's load are in
`sglang_loads_<name>_<digest>.shm`, under a name of ours (`sglang_server.py`): that of the engine's folder, which no
other engine has. Nothing else is touched: other engines live here too, and in containers that share /dev/shm
processes of the same number.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

SHM = Path("/dev/shm")
QUEUE = re.compile(r"sgl_shm_[a-z]+_(\d+)_[0-9a-f]+")
NOTES = "segments"
"""File in the engine's folder with the names of its queues: for the trainer, should the supervisor be killed."""


class Segments:
    """Finds the queues of the engine whose supervisor this process is. To be made before the engine starts, since what
    is there then is somebody else's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = set(_queues())

    def look(self) -> None:
        """Note what descendants of this process have made since the last time. Costs a listing of /dev/shm."""
        there = _queues()
        self._known &= there.keys()
        for name, pid in there.items():
            if name in self._known:
                continue
            ours = _descends(pid)
            if ours and not _maps(pid, name):
                continue  # it will in a moment, or has a namesake elsewhere
            self._known.add(name)
            if ours:
                with (self._folder / NOTES).open("a") as notes:
                    notes.write(f"{name}\n")


def remove(folder: Path) -> None:
    """All that the engine with this folder has left: when its processes have ended, and before its folder goes."""
    with contextlib.suppress(FileNotFoundError):
        for name in (folder / NOTES).read_text().split():
            (SHM / name).unlink(missing_ok=True)
    for path in SHM.glob(f"sglang_loads_{folder.name}_*.shm"):
        path.unlink(missing_ok=True)


def _queues() -> dict[str, int]:
    """Name -> process that made it."""
    with contextlib.suppress(FileNotFoundError):
        return {name: int(match[1]) for name in os.listdir(SHM) if (match := QUEUE.fullmatch(name))}
    return {}


def _descends(pid: int) -> bool:
    """Is this process below the one that asks?"""
    above = os.getpid()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while pid > 1 and pid != above:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == above
    return False


def _maps(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return f"{SHM / name}\n" in Path(f"/proc/{pid}/maps").read_text()
    return False
