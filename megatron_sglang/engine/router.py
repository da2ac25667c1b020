"""sglang-router in front of several engines, as a process of its own that dies with the trainer. Optional.

    group.router = Router(group)         # before group.start()
    async with group.client() as client: ...

It listens on 127.0.0.1, wants the engines' user key, and passes /generate on: token ids in, logprobs out, streams. Of
what rollouts need it cannot do two things (version 0.3.2; docs/modes.md has the evidence): it does not know
/abort_request (a stream is closed instead), and takes no lists of sampling parameters. Its policy cache_aware knows the
prefixes of token ids, and gives all that is new to one engine while nothing is under way. By the policy "manual"
requests of the same session go to the same engine, a new one where least runs. `EngineClient` itself chooses so too,
without a hop more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from megatron_sglang.config import RouterPolicy
from megatron_sglang.engine import supervised
from megatron_sglang.engine.async_http import SESSION_HEADER, Address
from megatron_sglang.engine.server import clean_environment
from megatron_sglang.errors import ConfigError, EngineError, EngineStartError, SetupError
from megatron_sglang.text import last_lines

if TYPE_CHECKING:
    from megatron_sglang.engine.group import EngineGroup

__all__ = ["SESSION_HEADER", "Router", "is_installed"]


def is_installed() -> bool:
    return importlib.util.find_spec("sglang_router") is not None


class Router:
    """In front of a group's engines. One that is started again has another port, and gets a new router (`ensure`).

    policy: of sglang-router. log_path: None: in a temporary folder that `close` removes.
    """

    def __init__(
        self,
        engines: EngineGroup,
        *,
        policy: RouterPolicy = "manual",
        log_path: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._engines = engines
        self._urls: list[str] = []
        self._key = ""
        self._policy, self._timeout_s = policy, timeout_s
        self._given_log = log_path
        self._folder: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def address(self) -> Address:
        """Without an admin key: nothing that changes state goes through it."""
        return Address(f"http://127.0.0.1:{self.port}", self._key, routed=True)

    @property
    def pid(self) -> int | None:
        """Pid of its supervisor (`launch.py`)."""
        return self._process.pid if self._process else None

    def ensure(self) -> Address:
        """Its address, when it is in front of the engines as they are now: it is started where it is not."""
        if self._process is None or self.why_dead() or self._urls != [one.url for one in self._engines.addresses]:
            self.close()
            self.start()
            self.wait_ready()
        return self.address

    def start(self) -> None:
        """Spawn and return at once."""
        assert self._process is None, "started already"
        addresses = self._engines.addresses
        if len(keys := {address.api_key for address in addresses}) != 1:
            raise ConfigError(f"a router knows one key for all engines; these {len(addresses)} have {len(keys)}")
        self._urls, self._key = [address.url for address in addresses], addresses[0].api_key
        self._folder = Path(tempfile.mkdtemp(prefix="msgl-"))
        spec = {"module": __name__, "folder": str(self._folder), "key": self._key, "urls": self._urls}
        spec |= {"request_s": self._engines.engines[0].options.request_timeout_s, "policy": self._policy}
        environment = clean_environment(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self._process, self.port = supervised.start(sys.executable, lambda _port: spec, environment, self._log)

    def wait_ready(self) -> None:
        """Block until it has found all engines; `EngineStartError` with its last log lines otherwise."""
        deadline = time.monotonic() + self._timeout_s
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=self.address.url, trust_env=False, timeout=5.0, headers=headers) as client:
            while True:
                if reason := self.why_dead():
                    raise EngineStartError(f"router did not come up: {reason}")
                if dead := [reason for engine in self._engines.engines if (reason := engine.why_dead())]:
                    raise EngineStartError(f"router waits for an engine that has died: {dead[0]}")
                with contextlib.suppress(httpx.TransportError):
                    found = client.get("/workers").json()["workers"]
                    if sorted(one["url"] for one in found if one["is_healthy"]) == sorted(self._urls):
                        return
                if time.monotonic() > deadline:
                    raise EngineStartError(f"router has not found its engines in {self._timeout_s:g} s: {self._tail()}")
                time.sleep(0.1)

    def why_dead(self) -> str | None:
        """None while it runs, or is not started; else its last log lines."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"exit code {self._process.returncode}: {self._tail()}"

    def close(self) -> None:
        """End it and wait until it is gone. Idempotent."""
        process, self._process = self._process, None
        if process is not None and not supervised.end(process):
            raise EngineError(f"the router's supervisor did not end in {supervised.CLOSE_TIMEOUT_S:g} s")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        assert self._folder is not None
        return Path(self._given_log) if self._given_log else self._folder / "router.log"

    def _tail(self) -> str:
        return last_lines(self._log.read_text(errors="replace"))


def serve(spec: dict[str, Any], listener: socket.socket) -> None:
    """In the router's process; the counterpart of `sglang_server.serve`."""
    try:
        from sglang_router.router import Router as SglangRouter  # its launch_router imports for half a minute more
        from sglang_router.router_args import RouterArgs
    except ImportError as error:
        raise SetupError("sglang-router is not installed; install megatron-sglang[router]") from error
    port = listener.getsockname()[1]
    listener.close()  # it binds its own; nobody has heard of this number
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics = probe.getsockname()[1]
    arguments = RouterArgs(
        host="127.0.0.1",
        port=port,
        worker_urls=spec["urls"],
        api_key=spec["key"],
        policy=spec["policy"],
        assignment_mode="min_load",
        prometheus_host="127.0.0.1",
        prometheus_port=metrics,
        log_level="warn",
        # What runs twice is not one request: its deadline is the client's, which is to come first.
        request_timeout_secs=math.ceil(spec["request_s"]) + 60,
        disable_retries=True,
        disable_circuit_breaker=True,
    )
    SglangRouter.from_args(arguments).start()
