"""A backend's processes: what they say when they end, and that none is left whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sglang.art.tree import Tree
from megatron_sglang.errors import DataError, EngineTimeoutError, MegatronSglangError

SHELL = ["/bin/sh", "-c"]
FAMILY = "sleep 300 & sleep 300"
"""A child with children of its own, which hear of no signal."""


async def family(tree: Tree) -> list[psutil.Process]:
    """The keeper and all that `FAMILY` makes."""
    assert tree.pid is not None
    keeper = psutil.Process(tree.pid)
    while len(found := keeper.children(recursive=True)) < 3 or [one.name() for one in found].count("sleep") < 2:
        await asyncio.sleep(0.05)
    return [keeper, *found]


def test_close_ends_everything(tmp_path: Path) -> None:
    async def run() -> list[psutil.Process]:
        tree = Tree()
        await tree.start(tmp_path / "keeper.log")
        await tree.launch("one", [*SHELL, FAMILY], log=tmp_path / "one.log", environment=dict(os.environ))
        async with asyncio.timeout(20):
            found = await family(tree)
        await tree.close()
        assert tree.children["one"].ended.is_set()
        return found

    _, alive = psutil.wait_procs(asyncio.run(run()), timeout=20)
    assert not alive


@pytest.mark.parametrize("victim", ["backend", "keeper"])
def test_a_kill_ends_everything(tmp_path: Path, victim: str) -> None:
    """SIGKILL of the process that holds the backend, or of the keeper itself."""
    code = f"""
import asyncio, json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_art_tree import FAMILY, SHELL, family
from megatron_sglang.art.tree import Tree

async def run():
    tree = Tree()
    await tree.start(Path({str(tmp_path)!r}, "keeper.log"))
    await tree.launch("one", [*SHELL, FAMILY], log=Path({str(tmp_path)!r}, "one.log"), environment=dict(os.environ))
    print(json.dumps([one.pid for one in await family(tree)]), flush=True)
    await asyncio.sleep(300)

asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdout is not None
        found = [psutil.Process(pid) for pid in json.loads(backend.stdout.readline())]
        (backend if victim == "backend" else found[0]).send_signal(signal.SIGKILL)
        watched = found if victim == "backend" else found[:2]
        _, alive = psutil.wait_procs(watched, timeout=20)
        for process in (*alive, *found):
            if process.is_running():
                process.kill()
        backend.kill()
    assert not alive


def test_children_of_a_killed_keeper_hold_the_lock_and_are_waited_for(tmp_path: Path) -> None:
    """They take a while to end, and a backend that began meanwhile would share their folder."""
    slow = "trap 'sleep 1; kill $!; exit 0' TERM; sleep 300 & echo up; wait"
    path = tmp_path / "lock"

    def is_free() -> bool:
        with path.open("a") as mine, contextlib.suppress(BlockingIOError):
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    async def run() -> None:
        held = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(held, fcntl.LOCK_EX)
        tree = Tree([held])
        await tree.start(tmp_path / "keeper.log")
        await tree.launch("one", [*SHELL, slow], log=tmp_path / "one.log", environment=dict(os.environ))
        async with asyncio.timeout(20):
            while "up" not in tree.children["one"].text() or tree.children["one"].process is None:
                await asyncio.sleep(0.02)
        os.close(held)
        assert tree.pid is not None
        os.kill(tree.pid, signal.SIGKILL)
        assert not is_free()
        await tree.close()
        assert is_free()

    asyncio.run(run())


def test_the_end_of_a_child_is_its_own_error(tmp_path: Path) -> None:
    """A rank's message where there is one, else the last lines of the log; never those of an earlier start."""
    log = tmp_path / "trainer.log"
    log.write_text("rank 0: ConfigError: of yesterday\n")

    async def refuse() -> None:
        raise DataError("refused")

    async def run() -> None:
        tree = Tree()
        await tree.start(tmp_path / "keeper.log")

        async def start(text: str) -> None:
            await tree.launch("run", [*SHELL, f"echo '{text}'; exit 3"], log=log, environment=dict(os.environ))

        await start("rank 1: DataError: no such column")
        with pytest.raises(DataError, match="no such column; log:"):
            await tree.alive("run", asyncio.sleep(60), 30, "a step")
        await start("Killed")
        with pytest.raises(MegatronSglangError, match=r"ended with code 3.*\nKilled"):
            await tree.alive("run", asyncio.sleep(60), 30, "a step")
        await tree.launch("run", ["/bin/sleep", "60"], log=log, environment=dict(os.environ))
        started = time.monotonic()
        with pytest.raises(DataError, match="refused"):
            await tree.alive("run", refuse(), 30, "a step")
        assert time.monotonic() - started < 5, "a refusal is no end, and none is waited for"
        with pytest.raises(EngineTimeoutError, match=r"a step was not done within 0\.1 s"):
            await tree.alive("run", asyncio.sleep(60), 0.1, "a step")
        await tree.close()

    asyncio.run(run())
