"""What SGLang leaves in /dev/shm goes with its engine, however that ends; what is of others stays."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_sglang.engine import segments

SERVER = """
    import ctypes, mmap, os, time
    from pathlib import Path

    def make(name):
        descriptor = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(descriptor, 4096)
        return mmap.mmap(descriptor, 4096)

    def serve(spec, listener):
        folder = Path(spec["folder"])
        if os.fork() == 0:  # a scheduler, which dies with its parent
            ctypes.CDLL(None).prctl(1, 9)
            held = [make(f"sgl_shm_mq_{os.getpid()}_0123abcd"), make(f"sglang_loads_{folder.name}_deadbeef.shm")]
            (folder / "scheduler").write_text(str(os.getpid()))
            time.sleep(60)
        time.sleep(60)
"""


@pytest.fixture
def foreign() -> Iterator[list[Path]]:
    """Of a living process, of a dead one, and of an engine whose folder is called almost like ours."""
    names = [f"sgl_shm_mq_{os.getpid()}_{os.urandom(4).hex()}", f"sgl_shm_mq_{2**22 + 1}_{os.urandom(4).hex()}"]
    names.append(f"sglang_loads_msgl-other{os.getpid()}_deadbeef.shm")
    paths = [segments.SHM / name for name in names]
    for path in paths:
        path.write_bytes(b"x")
    yield paths
    for path in paths:
        path.unlink(missing_ok=True)


def start(folder: Path) -> subprocess.Popen[str]:
    """A supervisor with a server as short as SGLang is long."""
    (folder / "tiny_server.py").write_text("\n".join(line[4:] for line in SERVER.splitlines()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_sglang.engine.launch", str(listener.fileno())],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])},
            pass_fds=[listener.fileno()],
            start_new_session=True,
            text=True,
        )
    assert supervisor.stdin is not None
    supervisor.stdin.write(json.dumps({"module": "tiny_server", "folder": str(folder)}) + "\n")
    supervisor.stdin.flush()
    return supervisor


def left(folder: Path, scheduler: str) -> list[str]:
    return [name for name in os.listdir(segments.SHM) if f"_{scheduler}_0123abcd" in name or folder.name in name]


@pytest.mark.parametrize("ending", ["asked", "trainer gone", "server killed", "rank killed", "supervisor killed"])
def test_what_an_engine_made_is_removed_and_nothing_else(ending: str, tmp_path: Path, foreign: list[Path]) -> None:
    """682 of them had gathered on one machine: 25 MB of memory each as soon as a queue has been used."""
    folder = Path(tempfile.mkdtemp(prefix="msgl-", dir=tmp_path))
    supervisor = start(folder)
    try:
        deadline = time.monotonic() + 30
        while not (folder / segments.NOTES).exists():
            assert supervisor.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        scheduler = (folder / "scheduler").read_text()
        assert len(left(folder, scheduler)) == 2
        foreign.append(late := segments.SHM / f"sgl_shm_mq_{os.getpid()}_{os.urandom(4).hex()}")
        late.write_bytes(b"x")
        mapped = mmap.mmap(os.open(late, os.O_RDONLY), 1, prot=mmap.PROT_READ)
        time.sleep(0.5)  # it is looked at
        tree = psutil.Process(supervisor.pid).children(recursive=True)
        if ending == "asked":
            supervisor.send_signal(signal.SIGTERM)
        elif ending == "trainer gone":
            assert supervisor.stdin is not None
            supervisor.stdin.close()
        elif ending == "rank killed":
            psutil.Process(int(scheduler)).kill()
            time.sleep(0.5)
            tree[0].kill()
        else:
            (supervisor if ending == "supervisor killed" else tree[0]).kill()
        supervisor.wait(20)
        assert not psutil.wait_procs(tree, 10)[1]
        if ending == "supervisor killed":
            assert len(left(folder, scheduler)) == 2, "nobody was there to do it"
            segments.remove(folder)  # as Server.close does
        assert left(folder, scheduler) == []
        assert all(path.exists() for path in foreign)
        mapped.close()
        assert folder.exists() == (ending != "trainer gone")
    finally:
        supervisor.kill()
        supervisor.wait(10)
        segments.remove(folder)


def test_a_namesake_is_left_alone(tmp_path: Path) -> None:
    """Containers may share /dev/shm and not the numbers of their processes: a number of ours is not enough."""
    child = subprocess.Popen(["sleep", "30"])
    path = segments.SHM / f"sgl_shm_mq_{child.pid}_{os.urandom(4).hex()}"
    try:
        looking = segments.Segments(tmp_path)
        path.write_bytes(b"x")
        looking.look()
        segments.remove(tmp_path)
        assert path.exists()
    finally:
        child.kill()
        child.wait(10)
        path.unlink(missing_ok=True)
