"""Attacks on the sandbox: each is a solution's function that really tries, and whose return value says what it saw.

Every attack on the walls runs twice in namespaces, with and without the system call filter, so that neither wall hides
a hole in the other. Where that is possible the same attack succeeds outside (`bare`), which proves that it is one.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_sglang.rewards.sandbox import Job, Limits, Sandbox

LIMITS = Limits(cpu_s=1, wall_s=5.0, memory_mb=300, processes=12, tmp_mb=4)
STRONG = [("namespaces", True), ("namespaces", False)]
STRONG += [("bubblewrap", True), ("bubblewrap", False)] if shutil.which("bwrap") else []


@pytest.fixture(scope="module", params=STRONG, ids=lambda param: f"{param[0]}-{'filter' if param[1] else 'no-filter'}")
def strong(request):
    tier, use_filter = request.param
    with Sandbox(tier, limits=LIMITS, workers=1, use_filter=use_filter) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def bare():
    """The tier without walls and without the filter: what an attack achieves when nothing but limits stops it."""
    with Sandbox("unsafe-local", unsafe=True, limits=LIMITS, workers=1, use_filter=False) as sandbox:
        yield sandbox


def attack(sandbox: Sandbox, source: str, *args: object):
    """What the attack returned; the test passes whatever it is, and reports it in the only way out there is."""
    test = f"raise AssertionError('saw ' + ascii(candidate(*{args!r})))"
    (verdict,) = sandbox.run([Job(source, "attack", (test,))])
    prefix = "assertion failed saw "
    assert verdict.detail.startswith(prefix), f"the attack did not run: {verdict}"
    return eval(verdict.detail.removeprefix(prefix), {})


def outcome(sandbox: Sandbox, source: str):
    (verdict,) = sandbox.run([Job(source, "attack", ({"args": [], "expect": None},))])
    return verdict


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


CONNECT = """
import socket
def attack(port):
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError as error:
        return type(error).__name__
    return "connected"
"""


def test_network_is_out_of_reach(strong, bare):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert attack(bare, CONNECT, port) == "connected"
        assert attack(strong, CONNECT, port) in ("OSError", "PermissionError", "ConnectionRefusedError")


READ = """
def attack(path):
    try:
        with open(path, "rb") as file:
            return len(file.read(10))
    except OSError as error:
        return type(error).__name__
"""


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/etc/passwd", __file__, f"/proc/{os.getpid()}/environ", "/proc/1/mem"]
)
def test_files_of_the_machine_do_not_exist(strong, path):
    assert attack(strong, READ, path) == "FileNotFoundError"


def test_files_of_the_machine_can_be_read_without_walls(bare):
    """The witness that the attack above reads files where there are any."""
    assert attack(bare, READ, "/etc/passwd") == 10  # as another user, who may not see the folder of this file


def test_environment_of_the_trainer_is_not_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_API_KEY", "hunter2")
    source = "import os\ndef attack():\n    return sorted(os.environ)\n"
    for tier in ("namespaces", "unsafe-local"):
        with Sandbox(tier, unsafe=True, workers=1) as sandbox:
            assert set(attack(sandbox, source)) <= {"HOME", "LANG", "PATH", "TMPDIR", "PWD"}


def test_nothing_but_python_and_tmp_is_visible_and_nothing_can_be_written(strong):
    source = """
import os
def attack():
    writable, seen = [], 0
    for folder, _, _ in os.walk("/"):
        seen += 1
        try:
            open(folder + "/x", "w").close()
            writable.append(folder)
        except OSError:
            pass
    return seen > 20, writable
"""
    assert attack(strong, source) == (True, ["/tmp"])


def test_it_is_nobody_without_capabilities_and_cannot_regain_any(strong):
    source = """
import ctypes, os
def attack():
    libc = ctypes.CDLL(None)
    head, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(head, data)
    results = [libc.setresuid(0, 0, 0), libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)]
    return os.getuid(), list(data), results[0], results[2]
"""
    assert attack(strong, source) == (65534, [0] * 6, -1, -1)


FORK_BOMB = """
import os
def attack():
    started = 0
    for _ in range(200):
        try:
            if os.fork() == 0:
                while True:
                    try:
                        os.fork()
                    except OSError:
                        pass
            started += 1
        except OSError as error:
            return started, type(error).__name__
    return started, ""
"""


def test_fork_bomb_is_bounded_and_leaves_nothing(strong):
    if strong.tier == "bubblewrap" and not strong.filtered and os.geteuid() == 0:
        pytest.skip("bubblewrap's jobs stay root's, whose processes the kernel does not count")
    idle = descendants()
    started, error = attack(strong, FORK_BOMB)
    assert error == ("PermissionError" if strong.filtered else "BlockingIOError")
    assert started == 0 if strong.filtered else 0 < started <= LIMITS.processes
    assert outcome(strong, "def attack():\n    return None\n").passed == (True,), "the box is usable at once"
    assert descendants() <= idle


DAEMON = """
import os, time
def attack():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open("daemon", "w").close()
            time.sleep(600)
        os._exit(0)
    while not os.path.exists("daemon"):
        time.sleep(0.01)
    return "daemon runs"
"""


def test_daemon_dies_with_its_job():
    limits = replace(LIMITS, processes=10_000)  # without namespaces this counts all processes of the user
    for tier in ("namespaces", "unsafe-local"):
        with Sandbox(tier, unsafe=True, limits=limits, workers=1, use_filter=False) as sandbox:
            outcome(sandbox, "def attack():\n    return None\n")
            idle = descendants()
            assert attack(sandbox, DAEMON) == "daemon runs"
            outcome(sandbox, "def attack():\n    return None\n")
            assert descendants() == idle


def test_memory_is_bounded(strong, bare):
    source = """
def attack():
    small = len(bytearray(50 << 20))
    try:
        return small, len(bytearray(10 << 30))
    except MemoryError:
        return small, "MemoryError"
"""
    for sandbox in (strong, bare):
        assert attack(sandbox, source) == (50 << 20, "MemoryError")


def test_disk_is_bounded_and_emptied(strong):
    source = """
import os
def attack():
    before, written = os.listdir("/tmp"), 0
    os.makedirs("/tmp/a/b")
    try:
        for number in range(100):
            with open(f"/tmp/a/{number}", "wb", buffering=0) as file:
                for _ in range(64):
                    written += file.write(bytes(1 << 16))
    except OSError as error:
        return before, written, error.errno
"""
    for _ in range(2):
        before, written, number = attack(strong, source)
        assert before == []
        assert 0 < written <= LIMITS.tmp_mb << 20
        assert number in (27, 28)


def test_size_of_a_file_is_bounded_without_walls(bare):
    source = """
def attack():
    written = 0
    try:
        with open("big", "wb", buffering=0) as file:
            while True:
                written += file.write(bytes(1 << 16))
    except OSError as error:
        return written, error.errno
"""
    assert attack(bare, source) == (LIMITS.tmp_mb << 20, 27)
    assert not list(Path("/tmp").glob("megatron-sglang-box-*/big"))


@pytest.mark.parametrize(
    "source",
    [
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef attack():\n    while True:\n        pass\n",
        "import time\ndef attack():\n    time.sleep(100)\n",
        "while True:\n    pass\n",
    ],
    ids=["ignores-signals", "sleeps", "never-loads"],
)
@pytest.mark.parametrize("tier", ["namespaces", "unsafe-local"])
def test_endless_job_is_killed(tier, source):
    with Sandbox(tier, unsafe=True, limits=Limits(cpu_s=1, wall_s=1.5), workers=1) as sandbox:
        begin = time.monotonic()
        assert outcome(sandbox, source).detail == "timeout"
        assert time.monotonic() - begin < 10


def test_recursion_and_crashes_end_only_their_own_job(strong, bare):
    recursion = "def attack(n=0):\n    return attack(n + 1) + 1\n"
    crash = "import ctypes\ndef attack():\n    ctypes.string_at(8)\n"
    for sandbox in (strong, bare):
        assert outcome(sandbox, recursion).detail.startswith("RecursionError")
        assert "SIGSEGV" in outcome(sandbox, crash).detail
        assert outcome(sandbox, "def attack():\n    return None\n").passed == (True,)


def test_huge_output_goes_nowhere_and_huge_values_are_refused(strong):
    printed = "def attack():\n    print('PASS' * 5_000_000)\n"
    assert outcome(strong, printed).passed == (True,)
    verdict = outcome(strong, "def attack():\n    return 'x' * (2 << 20)\n")
    assert verdict.passed == (False,)
    assert "over the limit" in verdict.detail


def test_solution_holds_no_descriptor_but_its_channel(strong, bare):
    source = """
import os
def attack():
    held = []
    for fd in range(1024):
        try:
            held.append((fd, os.fstat(fd).st_mode >> 12))
        except OSError:
            pass
    return [kind for fd, kind in held if fd > 2], len(held)
"""
    for sandbox in (strong, bare):
        assert attack(sandbox, source) == ([0o14], 4)


def test_processes_of_the_box_cannot_be_killed_or_read(strong):
    source = """
import os, signal
def attack():
    results = []
    for pid in (1, os.getppid(), -1):
        try:
            os.kill(pid, signal.SIGKILL)
            results.append("sent")
        except OSError as error:
            results.append(type(error).__name__)
    return results
"""
    box = strong._boxes[0]
    process = box._process
    attack(strong, source)
    assert outcome(strong, "def attack():\n    return None\n").passed == (True,)
    assert box._process is process, "process 1 has survived"


RESTRICTED_REFUSES = {
    "network": CONNECT,
    "files": READ,
    "fork bomb": FORK_BOMB,
    "daemon": DAEMON,
    "open": "def attack():\n    return open('/etc/passwd')\n",
    "import function": "def attack():\n    return __import__('os')\n",
    "subclasses": "def attack():\n    return ().__class__.__base__.__subclasses__()\n",
    "builtins": "def attack():\n    return __builtins__\n",
    "format": "def attack():\n    return '{0.__class__}'.format(1)\n",
    "frame": "def attack():\n    return (x for x in [1]).gi_frame.f_back\n",
    "getattr": "def attack():\n    return getattr(1, 're' + 'al')\n",
    "match attribute": "def attack():\n    match 1:\n        case object(__class__=c):\n            return c\n",
    "decorator": "@eval\ndef attack():\n    return 1\n",
    "class": "class attack:\n    pass\n",
    "traceback": "def attack():\n    try:\n        1 / 0\n    except Exception as e:\n        return e.__traceback__\n",
    "power": "def attack():\n    return 9 ** 9 ** 9\n",
    "shift": "def attack(n=10 ** 9):\n    return 1 << n\n",
    "endless": "def attack():\n    while True:\n        pass\n",
    "async": "async def attack():\n    return 1\n",
    "type": "def attack():\n    return type(1)\n",
    "star import": "from os import *\ndef attack():\n    return 1\n",
}


@pytest.fixture(scope="module")
def restricted():
    with Sandbox("restricted", limits=LIMITS, workers=1) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", RESTRICTED_REFUSES)
def test_restricted_tier_refuses_everything_with_a_way_out(restricted, name):
    detail = outcome(restricted, RESTRICTED_REFUSES[name]).detail
    assert detail.startswith("Refused: "), detail


def test_restricted_tier_bounds_what_it_runs(restricted):
    assert outcome(restricted, "def attack():\n    return len('x' * 10_000_000_000)\n").detail.startswith("MemoryError")
    assert outcome(restricted, "def attack():\n    n = 1\n    while n:\n        n += 1\n").detail == "timeout"
    assert outcome(restricted, "def attack():\n    return attack()\n").detail.startswith("RecursionError")


def test_restricted_tier_runs_pure_functions(restricted):
    source = """
def attack():
    words = sorted({w.strip().upper() for w in "b, a, c".split(",")}, reverse=True)
    total = 0
    for i, w in enumerate(words):
        total += (i + 1) ** 2 if w != "B" else -1
    return None if (total, f"{words[0]}!") == (9, "C!") else (total, words)
"""
    assert outcome(restricted, source).passed == (True,)
