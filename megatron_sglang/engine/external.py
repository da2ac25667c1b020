"""Engines that run already: connected to by URL, given weights, watched; never started, never ended.

    --rollout-external-engine-addrs http://127.0.0.1:30000 http://127.0.0.1:30001

    MEGATRON_SGLANG_ENGINE_KEY         --api-key of the engines; _FILE: a file that holds it
    MEGATRON_SGLANG_ENGINE_ADMIN_KEY   their --admin-api-key, where they have one; _FILE likewise
    MEGATRON_SGLANG_MAILBOX            mailbox folder of each engine, in the order of the URLs, with ":" between

An engine that was launched with our loader, on this machine, is updated and proved as one of ours:

    MEGATRON_SGLANG_MAILBOX=/run/user/1000/engine0 python -m sglang.launch_server ...
        --load-format dummy --custom-weight-loader megatron_sglang.engine.loader.load

Any other gets full tensors by SGLang's stock routes (`stock.py`), and less is proved: `ExternalEngine.unproved`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_sglang.buckets import Bucket
from megatron_sglang.engine import stock
from megatron_sglang.engine.client import Address
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.http import Http
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.options import LOADER, MAILBOX_VARIABLE, EngineOptions, why_moved
from megatron_sglang.engine.server import SGLANG_VERSION
from megatron_sglang.errors import ConfigError, EngineError, EngineStartError, SetupError, WeightSyncError
from megatron_sglang.layout import RankLayout

KEY, ADMIN_KEY = "MEGATRON_SGLANG_ENGINE_KEY", "MEGATRON_SGLANG_ENGINE_ADMIN_KEY"
NO_KEY = "none"
"""Sent where none is given; a server without keys does not look at it."""

PROBE_S = 5.0


def connect(
    options: EngineOptions, urls: Sequence[str], environment: Mapping[str, str] = os.environ
) -> ExternalEngine | EngineGroup:
    """The engines at `urls` as one; connected by `wait_ready`. options: their dtype and our deadlines."""
    api_key = read_key(KEY, environment)
    admin_key = read_key(ADMIN_KEY, environment) or api_key
    folders = [folder for folder in environment.get(MAILBOX_VARIABLE, "").split(os.pathsep) if folder]
    if folders and len(folders) != len(urls):
        raise ConfigError(
            f"{MAILBOX_VARIABLE} names {len(folders)} folders, engine.external {len(urls)} engines; give each engine a "
            "folder of its own, in the same order, or none"
        )
    engines = [
        ExternalEngine(options, url, api_key, admin_key, Path(folders[number]) if folders else None)
        for number, url in enumerate(urls)
    ]
    return engines[0] if len(engines) == 1 else EngineGroup.of(engines)


def read_key(name: str, environment: Mapping[str, str]) -> str:
    """A key from the environment, or from the file that NAME_FILE names; "" without both."""
    if path := environment.get(f"{name}_FILE"):
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{name}_FILE={path} cannot be read: {error.strerror}; it must hold the key") from error
    return environment.get(name, "")


class Remote:
    """Stands where `Server` does: a process that is not ours."""

    log_path = None
    pid = None
    port = 0

    def __init__(self, url: str, api_key: str, admin_key: str, mailbox: Path | None) -> None:
        parts = httpx.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(f"engine.external names {url!r}; expected a URL such as http://127.0.0.1:30000")
        self.url, self.host = url.rstrip("/"), parts.host
        self.api_key, self.admin_key = api_key or NO_KEY, admin_key or NO_KEY
        self.incarnation = 0
        self._mailbox = mailbox

    @property
    def mailbox(self) -> Path:
        if self._mailbox is None:
            raise EngineError(f"no mailbox folder is known of the engine at {self.url}; set {MAILBOX_VARIABLE}")
        return self._mailbox

    @property
    def has_mailbox(self) -> bool:
        return self._mailbox is not None and self._mailbox.is_dir()

    def why_dead(self) -> str | None:
        """None while it answers; its process is not ours to look at."""
        try:
            status = httpx.get(f"{self.url}/health", timeout=PROBE_S, trust_env=False).status_code
        except httpx.TransportError as error:
            return f"{self.url} does not answer: {error}"
        return None if status == 200 else f"{self.url}/health answers {status}"

    def refuses_admin(self) -> bool:
        """Asked by a message without a body, which nobody acts on: keys are looked at first."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        answer = httpx.post(f"{self.url}/update_weight_version", headers=headers, timeout=PROBE_S, trust_env=False)
        return answer.status_code in (401, 403)

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while reason := self.why_dead():
            if time.monotonic() > deadline:
                raise EngineStartError(
                    f"no engine after {timeout_s:g} s: {reason}; compare engine.external with the address it serves"
                )
            time.sleep(0.2)
        self.incarnation += 1


class ExternalEngine(HttpEngine):
    """See `HttpEngine`. `release` works where the engine has SGLang's memory saver.

    unproved: what is not proved of its weights, for people; empty where all is.
    """

    def __init__(
        self, options: EngineOptions, url: str, api_key: str, admin_key: str, mailbox: Path | None = None
    ) -> None:
        super().__init__(options)
        self.remote = Remote(url, api_key, admin_key, mailbox)
        self.server: Any = self.remote
        self.unproved = ""
        self._stock: stock.StockUpdate | None = None

    @property
    def addresses(self) -> list[Address]:
        return [Address(self.remote.url, self.remote.api_key, self.remote.admin_key)]

    # ---- life: it has its own ----

    def start(self) -> None:
        """Nothing: it runs."""

    def wait_ready(self, stale: str = "") -> None:
        """Connect: `EngineStartError` where nothing answers, `SetupError` where it is not what it must be. What it has
        loaded itself is never served."""
        self.remote.wait_ready(self.options.start_timeout_s)
        self._http = Http(0, self.remote.api_key, self.remote.admin_key, self.remote.why_dead, url=self.remote.url)
        info = self._checked()
        self.options = dataclasses.replace(self.options, tp_size=info["tp_size"], ep_size=info.get("ep_size") or 1)
        has_loader = LOADER in (info.get("custom_weight_loader") or [])
        if has_loader and self.remote.has_mailbox:
            if reason := why_moved(info):
                raise SetupError(f"{self.remote.url} runs with {reason}; start it without, MoE with triton's runner")
            self.unproved, self._stock = "", None
            return
        missing = "our loader" if not has_loader else f"a mailbox folder that both know ({MAILBOX_VARIABLE})"
        self.unproved = (
            f"{self.remote.url} runs without {missing}: that each of its ranks holds every weight bit for bit is not "
            "proved; the weight version is checked, and SGLang's own answer to each message"
        )
        self._stock = stock.StockUpdate(self._http, self.options, self.remote.host)

    def why_dead(self) -> str | None:
        """Also where it answers, but was started again since the last version: then it has other weights."""
        if reason := self.remote.why_dead():
            return reason
        if self.version is None or self._http is None:
            return None
        try:
            served = self.served_version()
        except EngineError as error:  # it has gone since it was asked
            return str(error)
        if served != str(self.version):
            return f"{self.remote.url} serves weight version {served!r}, published was {self.version}: it was restarted"
        return None

    def served_version(self) -> str:
        """Weight version as the engine says it; a new one says "default"."""
        answer = self.connected.get("/model_info", PROBE_S)
        if answer.status_code != 200:
            raise EngineError(f"{self.remote.url}/model_info answers {answer.status_code}, expected 200")
        return str(answer.json()["weight_version"])

    def restart(self) -> None:
        """It is not ours to start: wait until somebody has, and connect again; stale until the next update."""
        self.close()
        self.stale, self.updating, self.version = "it was started again", None, None
        self.released.clear()
        self.unloaded.clear()
        self.wait_ready()

    def close(self) -> None:
        """Leave it running, with the weights that it has; requests of ours are not ended."""
        self._withdraw()
        if self._stock is not None:
            self._stock.close()
        if self._http is not None:
            self._http.close()
            self._http = None

    # ---- weights ----

    def begin_update(self, version: int, *, command: str = "begin", direct: bool = False) -> None:
        if self._stock is None:
            super().begin_update(version, command=command, direct=direct)
            return
        if direct:
            raise self._unable("the direct path")
        if command != "begin":
            raise self._unable(f"the method behind loader command {command!r}")
        self.note_update(version)
        self.updating = None
        with self.failing_as(f"weight version {version}, begin"):
            self.quiesce()
            self._take_weights_back()
        self._stock.begin()
        self.updating = version

    def load(self, bucket: Bucket) -> None:
        if self._stock is None:
            super().load(bucket)
            return
        with self.failing_as(self.in_update(bucket.version, f"bucket {bucket.index}")):
            self._stock.load(bucket)

    def load_from_disk(self, folder: str) -> None:
        """Load all weights of an HF folder that the engine can read, by SGLang's stock route, within an open update."""
        assert self.updating is not None, "begin_update() first"
        assert self._stock is not None, "an engine with our loader reads folders by the method `disk`"
        with self.failing_as(f"weight version {self.updating}, {folder}"):
            self._stock.read(Path(folder))

    def commit_update(self, version: int, buckets: int) -> str:
        """As `HttpEngine`; without our loader the digest is what SGLang's /weights_checker says, if it does."""
        if self._stock is None:
            return super().commit_update(version, buckets)
        with self.failing_as(self.in_update(version, "commit")):
            self._stock.commit(buckets)
            self.wake_up()
            self.publish(version)
            if (served := self.served_version()) != str(version):
                raise WeightSyncError(f"weight version {version}, commit: the engine says {served}")
            return stock.checksum(self.connected, self.options.update_timeout_s)

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
        if self._stock is None:
            return super().layout(shapes)
        raise self._unable("the direct path")

    # ---- steps ----

    def _unable(self, what: str) -> WeightSyncError:
        return WeightSyncError(f"{what} needs our loader in the engine at {self.remote.url}")

    def _checked(self) -> dict[str, Any]:
        """/server_info of an engine that will do."""
        answer = self.connected.get("/server_info", self.options.update_timeout_s)
        where = self.remote.url
        if answer.status_code in (401, 403):
            raise SetupError(f"{where} refuses the key; set {KEY} (or {KEY}_FILE) to its --api-key, and {ADMIN_KEY} to "
                             "its --admin-api-key")  # fmt: skip
        if answer.status_code != 200:
            raise SetupError(f"{where}/server_info answers {answer.status_code}; expected an SGLang {SGLANG_VERSION}")
        info = answer.json()
        if (version := info.get("version")) != SGLANG_VERSION:
            raise SetupError(f"{where} runs SGLang {version}, this package speaks to {SGLANG_VERSION}; start that one")
        if self.remote.refuses_admin():
            raise SetupError(f"{where} refuses the admin key; set {ADMIN_KEY} (or {ADMIN_KEY}_FILE)")
        for name, expected in (("dtype", self.options.dtype), ("dp_size", 1), ("pp_size", 1)):
            if (found := info.get(name, expected)) not in (expected, "auto"):
                raise SetupError(f"{where} runs with {name}={found}, expected {expected}; start it with that")
        return info
