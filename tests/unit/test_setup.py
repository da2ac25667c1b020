"""scripts/setup on machines unlike this one, without a network: a uv that only writes down what it is asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_sglang import host

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "lock.txt"

FAKE_UV = f"""#!/bin/sh
echo "$@" >>"$UV_CALLS"
[ "$1" != "$UV_FAILS_AT" ] || exit 2
[ "$1" != venv ] || {{ mkdir -p .venv/bin && touch .venv/pyvenv.cfg && ln -sf {sys.executable} .venv/bin/python; }}
"""
BROKEN_SHIM = '#!/bin/sh\necho "pyenv: command not found" >&2\nexit 127\n'


class Machine:
    """A copy of what scripts/setup reads, with a PATH of our own before the system's tools."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder / "clone", folder / "bin", folder / "calls"
        self.bin.mkdir()
        locks = ("requirements/lock.txt", "requirements/gpu.txt", "requirements/sizes.txt")
        for name in ("scripts/setup", *locks, "pyproject.toml"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.env = {"HOME": str(folder / "home"), "PATH": f"{self.bin}:/usr/bin:/bin", "UV_CALLS": str(self.calls)}
        self.program("uv", FAKE_UV)
        for name in ("python3.12", "python3", "python"):
            self.program(name, BROKEN_SHIM)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/setup; `called` holds what uv was asked to do by this run alone."""
        self.calls.write_text("")
        return subprocess.run(
            [self.folder / "scripts" / "setup", *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def called(self) -> list[str]:
        return [" ".join(line.split()[:2]) for line in self.calls.read_text().splitlines() if line != "--version"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


INSTALLS = ["venv --quiet", "pip sync", "pip install"]


def test_second_run_does_nothing_and_a_new_lock_installs_again(machine: Machine) -> None:
    """`make test` goes through set-up each time; it must not cost time, and must not miss a change."""
    first = machine.setup(PYTHON=sys.executable)
    assert (first.returncode, machine.called) == (0, INSTALLS), first.stderr
    second = machine.setup()
    assert (second.returncode, second.stdout, machine.called) == (0, "", [])
    with (machine.folder / "requirements" / "lock.txt").open("a") as lock:
        lock.write("left-pad==1.0\n")
    machine.setup(PYTHON=sys.executable)
    assert machine.called == INSTALLS[1:]


def test_what_is_imported_most_is_compiled(machine: Machine) -> None:
    """Without bytecode each rank and each server spends half of its start on compiling Megatron and SGLang, and Python
    writes none where the user's environment says so, as in many containers."""
    package = machine.folder / ".venv" / "lib" / "python3.12" / "site-packages" / "sglang"
    package.mkdir(parents=True)
    (machine.folder / ".venv" / "pyvenv.cfg").touch()
    (package / "template.py").write_text("def {{ name }}:\n")  # no program, and no reason to fail
    (package / "server.py").write_text("port = 1\n")
    assert machine.setup(PYTHON=sys.executable, PYTHONDONTWRITEBYTECODE="1").returncode == 0
    assert [path.name for path in (package / "__pycache__").iterdir()] == ["server.cpython-312.pyc"]


def test_a_gpu_host_gets_what_is_compiled_on_top(machine: Machine) -> None:
    """After the lock, so that torch is there to compile against, and after the CUDA headers, since uv builds what it is
    asked for before it installs any of it; and no later set-up takes it away."""
    assert machine.setup("--gpu", PYTHON=sys.executable).returncode == 0
    on_top = ["pip install"] * 2
    assert machine.called == [*INSTALLS, *on_top]
    before, last = machine.calls.read_text().splitlines()[-2:]
    assert "--no-deps --no-build-isolation --requirement requirements/gpu.txt" in last
    assert "--no-deps" in before
    assert "requirements/gpu.txt" not in before
    assert machine.setup().returncode == 0
    assert machine.called == []
    with (machine.folder / "requirements" / "lock.txt").open("a") as lock:
        lock.write("left-pad==1.0\n")
    machine.setup(PYTHON=sys.executable)
    assert machine.called == [*INSTALLS[1:], *on_top]
    assert "on top  transformer-engine-torch==2.17.1" in machine.setup("--dry-run").stdout


def test_an_unknown_argument_changes_nothing(machine: Machine) -> None:
    """`--cuda` must not install the other thing."""
    done = machine.setup("--cuda")
    assert (done.returncode, machine.called) == (1, [])
    assert "unknown argument '--cuda'; there are --gpu and --dry-run" in done.stderr


def test_an_interrupted_installation_is_not_taken_for_done(machine: Machine) -> None:
    """A download that failed once must not leave an environment that looks complete."""
    assert machine.setup(PYTHON=sys.executable, UV_FAILS_AT="pip").returncode != 0
    assert machine.setup(PYTHON=sys.executable).returncode == 0
    assert machine.called == INSTALLS[1:]


def test_a_moved_folder_is_installed_again(machine: Machine) -> None:
    """The scripts in .venv/bin name the folder they were made in, and pip leaves those that are there as they are; also
    where the first set-up in the new place was interrupted."""
    machine.setup(PYTHON=sys.executable)
    machine.folder = machine.folder.rename(machine.folder.with_name("moved"))
    machine.setup(PYTHON=sys.executable, UV_FAILS_AT="venv")
    machine.setup(PYTHON=sys.executable)
    assert machine.called == INSTALLS
    assert "--clear" in machine.calls.read_text()
    machine.setup(PYTHON=sys.executable)
    assert machine.called == []


def test_the_environment_of_another_folder_is_not_taken_over(machine: Machine) -> None:
    """A git worktree may have a link to the environment of the first checkout, whose users it would break."""
    machine.setup(PYTHON=sys.executable)
    shutil.copytree(machine.folder, other := machine.folder.with_name("worktree"), ignore=lambda *_: {".venv"})
    (other / ".venv").symlink_to(machine.folder / ".venv")
    first, machine.folder = machine.folder, other
    done = machine.setup(PYTHON=sys.executable)
    assert (done.returncode, machine.called) == (1, [])
    assert f".venv is a link to the environment of {first}, which would be taken over" in done.stderr


def test_shims_that_fail_do_not_hide_a_python_that_works(machine: Machine) -> None:
    """pyenv puts names into PATH for versions that are not active; the real one lies in its versions folder."""
    versions = Path(machine.env["HOME"]) / ".pyenv" / "versions" / "3.12.9" / "bin"
    versions.mkdir(parents=True)
    (versions / "python").symlink_to(sys.executable)
    assert machine.setup().returncode == 0
    assert machine.called == INSTALLS


def test_without_python_312_the_remedy_is_named(machine: Machine) -> None:
    """The first minute of most users: a clear sentence, nothing half made, and a way out."""
    done = machine.setup(PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "no Python 3.12 was found" in done.stderr
    assert "PYTHON=/path/to/python3.12 make install" in done.stderr
    assert not (machine.folder / ".venv").exists()


def test_dry_run_lists_names_and_sizes_without_anything(machine: Machine) -> None:
    """What will be on the disk must be known before it is, on a machine without Python, uv and network."""
    machine.program("uv", BROKEN_SHIM)
    done = machine.setup("--dry-run", PYTHON="/nowhere/python")
    assert done.returncode == 0, done.stderr
    assert "NOT FOUND" in done.stdout
    assert re.search(r"packages +\d{3}, \d{4} MiB installed", done.stdout)
    assert re.search(r"\d{3,4}\.\d MiB  torch==2\.11\.0\n", done.stdout)
    assert sorted(os.listdir(machine.folder)) == ["pyproject.toml", "requirements", "scripts"]


def test_a_folder_that_is_no_environment_is_not_overwritten(machine: Machine) -> None:
    """.venv may be something else of the user's."""
    (machine.folder / ".venv").mkdir()
    (machine.folder / ".venv" / "notes.txt").touch()
    assert "is no virtual environment" in machine.setup(PYTHON=sys.executable).stderr
    assert (machine.folder / ".venv" / "notes.txt").exists()


def test_lock_is_plain_complete_and_of_the_pins() -> None:
    """Names and versions only; a pin changed in pyproject.toml alone would install the old one."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", line)] == []
    locked = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["sglang"], *extras["dev"], *extras["ray"], *extras["wandb"]]
    for requirement in wanted:
        name, _, version = re.sub(r"\[.*?\]", "", requirement).partition("==")
        name = re.split("[<>~]", name)[0]
        assert name in locked
        assert version in ("", locked[name])


def test_lock_finds_the_uv_of_setup_and_leaves_nothing_half_made(machine: Machine) -> None:
    """Where set-up had to get uv itself it is in no PATH; and a resolution that fails must not leave a file in git."""
    shutil.copy(ROOT / "scripts" / "lock", machine.folder / "scripts" / "lock")
    (machine.folder / ".venv-uv" / "bin").mkdir(parents=True)
    (machine.bin / "uv").rename(machine.folder / ".venv-uv" / "bin" / "uv")
    environment = machine.env | {"UV_FAILS_AT": "pip"}
    done = subprocess.run([machine.folder / "scripts" / "lock"], env=environment, capture_output=True, check=False)
    assert (done.returncode, machine.called) == (2, ["pip compile"])
    assert not (machine.folder / "requirements" / "lock.new").exists()


def test_the_gpu_lock_is_of_the_pins_and_goes_on_top() -> None:
    """What the doctor asks for, what the extra pins and what is installed must be one; torch stays the lock's."""
    lines = [line for line in LOCK.with_name("gpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", line)] == []
    on_top = dict(line.split("==") for line in lines)
    base = dict(line.split("==") for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    assert on_top.keys() & base.keys() == {"nvidia-cudnn-cu13"}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    toolkit = f"cuda-toolkit[cccl,crt]=={base['cuda-toolkit']}"  # torch's, of which these are the headers
    assert extra == [f"transformer-engine[pytorch]=={on_top['transformer-engine']}", toolkit]
    assert {"nvidia-cuda-cccl", "nvidia-cuda-crt"} <= on_top.keys()
    assert on_top["transformer-engine-torch"] == on_top["transformer-engine"]
    assert on_top["nvidia-cudnn-cu13"] == host.CUDNN
    assert f"nvidia-cudnn-cu13=={host.CUDNN}" in LOCK.with_name("gpu_overrides.txt").read_text().splitlines()


def test_every_locked_package_has_a_size_and_every_override_a_reason() -> None:
    """`--dry-run` would leave a package out; an override nobody explains is never taken back."""
    rows = [line.split() for line in (LOCK.with_name("sizes.txt")).read_text().splitlines() if line[0] != "#"]
    names = {line.split("==")[0] for line in LOCK.read_text().splitlines() if line[0] != "#"}
    assert names <= {name for name, _ in rows}
    for name in ("overrides.txt", "gpu_overrides.txt"):
        reason = False
        for line in LOCK.with_name(name).read_text().splitlines():
            assert line.startswith("#") or not line or reason, f"{line!r} has no comment above it"
            reason = bool(line)
