"""An engine's process tree, seen from the trainer: started with a clean environment, watched, ended without a trace."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from megatron_sglang import host
from megatron_sglang.engine import segments, supervised
from megatron_sglang.engine.options import MAILBOX_VARIABLE, EngineOptions, server_args
from megatron_sglang.errors import EngineError, EngineStartError, SetupError
from megatron_sglang.text import last_lines

_TRAINER_ONLY = ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
_TRAINER_PREFIXES = ("LOCAL_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
KEEP_ALIVE_S = 600
"""How long our engines keep an idle connection; their clients keep it for `async_http.KEEP_S`."""
_NOT_FOR_ENGINES = ("expandable_segments", "roundup_power2_divisions")
_MODULES = {"sglang": "megatron_sglang.engine.sglang_server", "fake": "megatron_sglang.engine.fake"}
SGLANG_VERSION = "0.5.17"


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine may inherit: nothing of torchrun, which SGLang would take for its own; no expandable_segments,
    which break CUDA IPC and the memory saver; no rounding of sizes, since a KV cache is as large as there is room."""
    clean = {
        name: value
        for name, value in environment.items()
        if name not in _TRAINER_ONLY and not name.startswith(_TRAINER_PREFIXES)
    }
    for name in host.ALLOCATOR:
        given = clean.pop(name, "").split(",")
        kept = [item for item in given if item and not any(word in item for word in _NOT_FOR_ENGINES)]
        if kept:
            clean[name] = ",".join(kept)
    # SGLang 0.5.17 gives the old variable's value to the new one, which means the opposite (environ.py:1350, 1377).
    clean.pop(host.OLD_BALANCE, None)
    if host.is_on(environment, host.OLD_BALANCE):
        clean.setdefault(host.BALANCE, "false")
    return clean


def check_version(python: str) -> None:
    """The loader, the routes and the CPU fixes are those of one version of SGLang, which `python` must have."""
    found = version_in(python, "sglang")
    if found != SGLANG_VERSION:
        raise SetupError(
            f"the engine needs sglang {SGLANG_VERSION}, {python} has {found or 'none'}; install it there "
            "(megatron-sglang[sglang]), or set engine.python to the interpreter of an environment that has it"
        )


def version_in(python: str, package: str) -> str:
    """Version of a package as an interpreter sees it; "" if it does not. SetupError if that is no interpreter."""
    if python == sys.executable:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return ""
    code = f"import importlib.metadata as m\ntry: print(m.version({package!r}))\nexcept m.PackageNotFoundError: pass"
    try:
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(
            f"engine.python={python} is no Python that runs: {error}; set it to the bin/python of the engine's own "
            "environment"
        ) from error
    return done.stdout.strip()


class Server:
    """One engine's processes: supervisor (`launch.py`) > server > SGLang's schedulers and detokenizer."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.api_key = secrets.token_urlsafe(32)
        self.admin_key = secrets.token_urlsafe(32)
        self.port = 0
        self.incarnation = 0
        """How often it was started: whoever told the engine something can see here that a new process does not know
        it."""
        self._process: subprocess.Popen[str] | None = None
        self._folder: Path | None = None

    @property
    def mailbox(self) -> Path:
        """Folder where the ranks' answers appear (mode 0700)."""
        if self._folder is None:
            raise EngineError("engine is not started; call start() first")
        return self._folder / "mailbox"

    @property
    def log_path(self) -> Path | None:
        if self.options.log_path:
            return Path(self.options.log_path)
        return self._folder / "engine.log" if self._folder else None

    @property
    def pid(self) -> int | None:
        """Pid of the supervisor, and number of its process group."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Spawn and return at once."""
        if self._process is not None:
            raise EngineError("engine is started already; close() it before another start()")
        if self.options.kind == "sglang":
            check_version(self.options.python)
        self.incarnation += 1
        self._folder = Path(tempfile.mkdtemp(prefix="msgl-"))
        for name in ("mailbox", "tmp"):
            (self._folder / name).mkdir(mode=0o700)
        assert self.log_path is not None
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process, self.port = supervised.start(self.options.python, self._spec, self._environment(), self.log_path)

    def why_dead(self) -> str | None:
        """None while it runs; else its last log lines."""
        if self._process is None:
            return "it is not started"
        if self._process.poll() is None:
            return None
        return f"exit code {self._process.returncode}; last lines of {self.log_path}:\n{self.log_tail()}"

    def log_tail(self) -> str:
        path = self.log_path
        if path is None or not path.exists():
            return "(no log)"
        return last_lines(path.read_text(errors="replace"))

    def wait_ready(self) -> None:
        """Return once /health answers 200; `EngineStartError` when the server dies or the deadline passes."""
        deadline = time.monotonic() + self.options.start_timeout_s
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=2.0) as client:
            while True:
                if reason := self.why_dead():
                    raise EngineStartError(f"engine did not come up: {reason}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise EngineStartError(
                        f"engine was not healthy after {self.options.start_timeout_s:g} s; raise start_timeout_s, or "
                        f"see the last lines of {self.log_path}:\n{self.log_tail()}"
                    )
                time.sleep(0.1)

    def close(self) -> None:
        """End every process, wait until they are gone and the port is free, remove the folder. Idempotent."""
        process, self._process = self._process, None
        try:
            if process is not None:
                supervised.end(process)
                self._wait_port_free()
        finally:
            if self._folder is not None:
                segments.remove(self._folder)  # the supervisor did, unless it was killed
                shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_port_free(self) -> None:
        at_most_s = supervised.CLOSE_TIMEOUT_S
        deadline = time.monotonic() + at_most_s
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
            except OSError:
                return
            if time.monotonic() > deadline:
                raise EngineError(f"port {self.port} still answers {at_most_s:g} s after the engine was ended")
            time.sleep(0.05)

    def _spec(self, port: int) -> dict[str, Any]:
        """What `launch.py` is told through stdin, and passes on to `serve` of the kind's module."""
        options = self.options
        spec = {
            "module": _MODULES[options.kind],
            "folder": str(self._folder),
            "api_key": self.api_key,
            "admin_key": self.admin_key,
            "deterministic": options.deterministic,
        }
        if options.kind == "fake":
            folder = options.model_path if options.load_format == "auto" else None
            told = options.model_path if options.routed_experts else None
            spec |= {"tp_size": options.tp_size, "script": dict(options.extra), "model_folder": folder}
            return spec | {"routed_experts": told}
        return spec | {"server_args": server_args(options, port)}

    def _environment(self) -> dict[str, str]:
        package_root = str(Path(__file__).parents[2])
        environment = clean_environment(os.environ)
        environment |= {
            MAILBOX_VARIABLE: str(self.mailbox),
            "PYTHONPATH": os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")])),
            # SGLang leaves its socket files behind; here they go with the folder.
            "TMPDIR": str(self.mailbox.parent / "tmp"),
            # An engine lives on one node: its ranks need no other interface.
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            # /health would otherwise generate a token, which a paused or empty engine cannot.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            # After SGLang's five seconds a busy server closes a connection with a request in it that it has not read.
            "SGLANG_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        }
        environment.setdefault(
            "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))
        )
        if self.options.kind == "sglang" and self.options.resolved_device() == "cpu":
            from megatron_sglang.cpu import sglang_server as cpu

            environment |= cpu.environment(self.options.tp_size, os.cpu_count() or 1)
        return environment
