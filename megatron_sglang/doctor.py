"""`megatron-sglang doctor`: what of this machine and environment will not work, found before a run starts.

Every check returns findings; a `bad` one stops runs, a `warn` one slows or weakens them. Nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

from megatron_sglang import host
from megatron_sglang.errors import SandboxError, SetupError
from megatron_sglang.host import Finding
from megatron_sglang.placement import choose_mode

GIB = 2**30
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run() -> int:
    """Print all findings; 1 if one of them is bad."""
    bad = 0
    for check in CHECKS:
        for finding in check():
            bad += finding.level == "bad"
            print(f"{finding.level:5} {finding.subject:22} {finding.observed}", flush=True)
            if finding.remedy:
                print(f"{'':5} {'':22} -> {finding.remedy}", flush=True)
    print(f"\n{bad} problem{'s' * (bad != 1)} that will stop a run" if bad else "\nready")
    return 1 if bad else 0


def pins() -> Mapping[str, tuple[str, str]]:
    """Package -> (its pinned version, the extra that asks for it or ""), from this package's own metadata."""
    found: dict[str, tuple[str, str]] = {}
    for requirement in importlib.metadata.requires("megatron-sglang") or []:
        if match := re.match(r"([\w.-]+)(?:\[[^]]*\])?==([\w.]+)(?:.*extra == \"([\w-]+)\")?", requirement):
            found[match[1]] = (match[2], match[3] or "")
    return found


def check_versions() -> Iterator[Finding]:
    if sys.version_info[:2] == (3, 12):
        yield Finding("ok", "python", platform.python_version())
    else:
        yield Finding("bad", "python", platform.python_version(), "use Python 3.12: make install")
    for package, (pinned, extra) in pins().items():
        if extra == "gpu":
            continue  # its place depends on the device: `check_device`
        installed = _version(package)
        if installed is None or installed.split("+")[0] != pinned:
            remedy = "make install, or: uv pip install -r requirements/lock.txt"
            yield Finding(
                "bad", package, f"{installed or 'not installed'}; {pinned} is what this was written for", remedy
            )
        else:
            yield Finding("ok", package, installed)


def check_device() -> Iterator[Finding]:
    import torch

    engine = _version("transformer-engine")
    if not torch.cuda.is_available():
        yield Finding("ok", "device", f"no CUDA device: gloo on {os.cpu_count()} CPU cores")
        if engine:
            remedy = "uv pip uninstall transformer-engine transformer-engine-torch (its import needs a CUDA driver)"
            yield Finding("bad", "transformer-engine", f"{engine} on a machine without CUDA", remedy)
        return
    pinned = pins()["transformer-engine"][0]
    if engine == pinned:
        yield Finding("ok", "transformer-engine", pinned)
    else:
        remedy = "scripts/setup --gpu (it compiles for minutes)"
        yield Finding("bad", "transformer-engine", f"{engine or 'not installed'}; {pinned} is needed", remedy)
    yield from host.cudnn_findings(os.environ)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        observed = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        crowded = total - free > 2 * GIB
        remedy = (
            "another process holds its memory; end it, or choose others with CUDA_VISIBLE_DEVICES" if crowded else ""
        )
        yield Finding("warn" if crowded else "ok", f"cuda:{index}", observed, remedy)


def check_modes() -> Iterator[Finding]:
    """Which mode "auto" would choose, by how many trainer ranks torchrun starts here."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for ranks in sorted({max(1, devices // 2), max(1, devices)}):
        choice = choose_mode("auto", devices=devices, trainer_ranks=ranks)
        yield Finding("ok", "rollout mode", f"{choice.mode} with --nproc-per-node {ranks}: {choice.why}")


def check_engine_environment() -> Iterator[Finding]:
    """The engine's own environment, where there is one, and whether it goes with this one."""
    from megatron_sglang.engine.options import ENVIRONMENT, find_python
    from megatron_sglang.engine.server import check_version, version_in

    python = find_python()
    if python == sys.executable:
        return
    try:
        check_version(python)
    except SetupError as error:
        yield Finding("bad", str(ENVIRONMENT.parts[0]), "is found and would be used for the engine", str(error))
        return
    ours, theirs = (version_in(one, "torch") for one in (sys.executable, python))
    if ours.split("+")[0] == theirs.split("+")[0]:
        yield Finding("ok", str(ENVIRONMENT.parts[0]), f"the engine's own environment: torch {theirs}")
    else:
        remedy = "on a GPU, use sync.method=broadcast or disk: torch's CUDA handles belong to one version"
        yield Finding("warn", str(ENVIRONMENT.parts[0]), f"torch {theirs}, here {ours}", remedy)


def check_sandbox() -> Iterator[Finding]:
    from megatron_sglang.rewards.sandbox import Sandbox

    try:
        with Sandbox(workers=1) as sandbox:
            yield Finding("ok", "sandbox", sandbox.description)
    except SandboxError as error:
        yield Finding("warn", "sandbox", "none for untrusted code", str(error))


def check_network() -> Iterator[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            yield Finding("ok", "loopback", f"127.0.0.1 gives ports ({probe.getsockname()[1]} just now)")
    except OSError as error:
        yield Finding(
            "bad", "loopback", f"127.0.0.1 cannot be bound: {error}", "allow listening on the loopback interface"
        )
    proxy = next(
        (name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)), None
    )
    bypass = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    if proxy and not {"127.0.0.1", "*"} & set(bypass.replace(" ", "").split(",")):
        yield Finding("warn", proxy, "set, and not bypassed for 127.0.0.1", "export no_proxy=127.0.0.1,localhost")


def check_resources() -> Iterator[Finding]:
    import psutil

    for subject, folder, needed in (("disk", os.getcwd(), 5), ("temporary folder", tempfile.gettempdir(), 1)):
        yield _room(subject, shutil.disk_usage(folder).free, needed, f"free at least {needed} GiB at {folder}")
    if os.path.isdir("/dev/shm"):
        remedy = "in a container: docker run --shm-size=8g (or --ipc=host)"
        yield _room("shared memory", shutil.disk_usage("/dev/shm").free, 1, remedy)
    available = psutil.virtual_memory().available
    yield _room("memory", available, 6, "two trainer ranks and an engine take about 6 GiB on a CPU; end other programs")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield Finding("warn", "open files", f"{files}", "ulimit -n 65536")


def check_environment() -> Iterator[Finding]:
    """Variables that are known to break colocated runs when they are left in a shell."""
    left = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if left:
        remedy = f"start runs with torchrun from a shell without them: unset {' '.join(left)}"
        yield Finding("warn", "torchrun's variables", " ".join(left), remedy)
    yield from host.findings(os.environ)
    for name in (host.CONNECTIONS, *host.ATTENTION, "OMP_NUM_THREADS"):
        if name in os.environ:
            yield Finding("ok", name, os.environ[name])


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions,
    check_device,
    check_modes,
    check_engine_environment,
    check_sandbox,
    check_network,
    check_resources,
    check_environment,
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _room(subject: str, free: int, needed_gib: int, remedy: str) -> Finding:
    enough = free >= needed_gib * GIB
    return Finding("ok" if enough else "warn", subject, f"{free / GIB:.1f} GiB free", "" if enough else remedy)
