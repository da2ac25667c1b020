"""Which sandbox is chosen, that the choice fails closed, and that boxes neither linger nor take others down."""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_sglang.errors import ConfigError, SandboxError
from megatron_sglang.rewards.sandbox import Job, Limits, Sandbox

GOOD = Job("def f(a):\n    return a + 1\n", "f", ({"args": [1], "expect": 2},))
ENDLESS = Job("def f(a):\n    while True:\n        pass\n", "f", GOOD.tests)
ROOT = Path(__file__).parents[2]
REFUSE_NAMESPACES = "echo 0 > /proc/sys/user/max_user_namespaces && exec"


def without_namespaces(code: str) -> str:
    """Run Python code where the kernel refuses user namespaces and there is no bwrap; what it printed."""
    script = f'{REFUSE_NAMESPACES} "$0" -c "$1"'
    command = ["unshare", "-Ur", "sh", "-c", script, sys.executable, code]
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    if shutil.which("bwrap", path="/usr/bin:/bin"):
        pytest.skip("bubblewrap is installed system-wide")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60).stdout


CHOOSE = """
from megatron_sglang.rewards.sandbox import Sandbox, Job
from megatron_sglang.errors import SandboxError
try:
    with Sandbox(**{options!r}) as sandbox:
        job = Job('def f(a):\\n    return a + 1\\n', 'f', ({{'args': [1], 'expect': 2}},))
        print(sandbox.tier, sandbox.run([job])[0].passed, '|'.join(sandbox.refused.values()))
except SandboxError as error:
    print('SandboxError', error)
"""


def test_auto_prefers_isolation_even_where_less_is_allowed():
    with Sandbox(unsafe=True, all_pure=True, workers=1) as sandbox:
        assert sandbox.tier in ("bubblewrap", "namespaces")
        assert sandbox.filtered == (os.uname().machine in ("x86_64", "aarch64"))
        assert sandbox.tier in sandbox.description


def test_auto_refuses_without_isolation_and_says_what_to_do():
    printed = without_namespaces(CHOOSE.format(options={"workers": 1}))
    assert printed.startswith("SandboxError no sandbox for untrusted code")
    for hint in ("no bwrap on PATH", "unshare the user namespace: ", "--unsafe-local-sandbox", "user namespaces"):
        assert hint in printed


@pytest.mark.parametrize(("option", "tier"), [("all_pure", "restricted"), ("unsafe", "unsafe-local")])
def test_auto_falls_back_only_as_far_as_it_may(option, tier):
    printed = without_namespaces(CHOOSE.format(options={"workers": 1, option: True}))
    assert printed.startswith(f"{tier} (True,) ")
    assert "unshare the user namespace: " in printed, "the reason why the stronger tiers were refused is kept"


def test_unsafe_tier_needs_a_word_of_its_own():
    with pytest.raises(SandboxError, match="--unsafe-local-sandbox"):
        Sandbox("unsafe-local")


def test_tier_that_does_not_isolate_is_not_believed(tmp_path, monkeypatch):
    """A bwrap that runs its program without any isolation must be found out by the probe."""
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -P ]; do last=$1; shift; done\ncd /; exec "$last" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="bubblewrap"):
        Sandbox("bubblewrap", workers=1)


@pytest.mark.parametrize("options", [{"tier": "docker"}, {"workers": 0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"expected|choose"):
        Sandbox(**options)


@pytest.mark.parametrize("victim", ["server", "guard"])
def test_box_killed_between_jobs_is_replaced_and_nobody_is_blamed(victim):
    with Sandbox("namespaces", workers=1) as sandbox:
        guards = [psutil.Process(box._process.pid) for box in sandbox._boxes]
        servers = [server for guard in guards for server in guard.children()]
        assert len(servers) == 2
        for process in servers if victim == "server" else guards:
            process.kill()
        assert not psutil.wait_procs(servers, timeout=10)[1], "a server dies with its guard"
        assert [verdict.passed for verdict in sandbox.run([GOOD] * 4)] == [(True,)] * 4


def test_box_killed_during_a_job_fails_that_job_only():
    with Sandbox("namespaces", workers=1, limits=Limits(cpu_s=5, wall_s=10)) as sandbox:
        (server,) = psutil.Process(sandbox._boxes[0]._process.pid).children()

        def kill_amid_the_job() -> None:
            while not server.children():
                time.sleep(0.01)
            time.sleep(1.0)  # until the box has said so
            server.kill()

        killer = threading.Thread(target=kill_amid_the_job, daemon=True)
        killer.start()
        first, second = sandbox.run([ENDLESS, GOOD])
        killer.join(20)
        assert first.passed == (False,)
        assert "brought its sandbox down" in first.detail
        assert second.passed == (True,)


OWNER = """
import sys
from megatron_sglang.rewards.sandbox import Job, Limits, Sandbox
sandbox = Sandbox({tier!r}, unsafe=True, workers=1, limits=Limits(cpu_s=60, wall_s=60.0))
print("ready", flush=True)
sandbox.run([Job("def f(a):\\n    while True:\\n        pass\\n", "f", ({{"args": [1], "expect": 2}},))])
"""


@pytest.mark.parametrize("tier", ["namespaces", "unsafe-local"])
def test_everything_ends_when_the_trainer_is_killed(tier):
    command = [sys.executable, "-c", OWNER.format(tier=tier)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"ready\n"
            started, folders = running(owner.pid, folders=tier == "unsafe-local")
        finally:
            owner.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=15)
    assert not alive
    assert not [folder for folder in folders if Path(folder).exists()]


def running(owner: int, *, folders: bool) -> tuple[list[psutil.Process], set[str]]:
    """The guards and servers of two boxes and the job, once it runs, and the private folder it is in."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        started, found = psutil.Process(owner).children(recursive=True), set()
        for process in started:
            with contextlib.suppress(psutil.Error):  # gone, or not ours to look into
                found |= {folder for folder in [process.cwd()] if "megatron-sglang-box-" in folder}
        if len(started) >= 5 and (found or not folders):
            return started, found
        time.sleep(0.02)
    raise AssertionError("the job never ran")


def test_many_jobs_leak_neither_descriptors_nor_processes():
    with Sandbox("namespaces", workers=2) as sandbox:
        sandbox.run([GOOD] * 4)
        gc.collect()  # what earlier tests left open
        before = psutil.Process().num_fds(), psutil.Process().children(recursive=True)
        sandbox.run([GOOD, Job("def f(", "f", GOOD.tests)] * 50)
        assert psutil.Process().num_fds() <= before[0]
        assert psutil.Process().children(recursive=True) == before[1]


def test_close_leaves_no_process_and_no_folder():
    before = psutil.Process().children(recursive=True)
    where = Job("import os\ndef f(a):\n    return os.getcwd()\n", "f", GOOD.tests)
    for tier in ("namespaces", "unsafe-local"):
        with Sandbox(tier, unsafe=True, workers=2) as sandbox:
            folder = ast.literal_eval(sandbox.run([where])[0].detail.split("wrong value ")[1].split(",")[0])
        sandbox.close()
        assert folder.startswith("/tmp")
        assert folder == "/tmp" or not Path(folder).exists()
    assert psutil.Process().children(recursive=True) == before
