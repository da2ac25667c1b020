"""How another process finds the engine of a live run, and knows at each moment whether it may be used.

The owner of an engine keeps one file, RUN_FOLDER/engine.json, mode 0600, replaced as a whole at each change:

    {"format": 1, "pid": 4711, "started": 123456, "model": "/models/m", "dtype": "bfloat16", "context_length": null,
     "addresses": [{"url": "http://127.0.0.1:40001", "api_key": "..."}], "reason": "", "version": 3}

`reason` says why the engine must not be used; it is there before the first request is aborted, and empty only after the
new version is served. The key is the one for /generate: who reads the file cannot change the engine. Several engines of
one run share a file, and one reason.

A reader looks at the file's stamp before each request (`Watch`). Without a reader nothing waits for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sglang.errors import EngineError
from megatron_sglang.private_file import replacing

NAME = "engine.json"
"""Of the file in a run's folder."""

FORMAT = 1
ALIVE_EVERY_S = 0.5
"""How long a reader believes that the owner's process, seen alive, still lives."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What the file says."""

    pid: int
    started: int
    """When `pid` was started, in the kernel's ticks: tells it from a later process of the same number."""
    model: str
    """HF folder: tokenizer and sizes."""
    dtype: str
    context_length: int | None
    """Where it is less than the model's own."""
    addresses: tuple[tuple[str, str], ...]
    """(URL, key for /generate) of each engine."""
    reason: str
    """Why the engine must not be used; empty while it may."""
    version: int | None
    """Weight version that is served, or was last."""
    adapter: str = ""
    """Name of the adapter that requests must ask for; empty: none."""

    def to_json(self) -> dict[str, Any]:
        addresses = [{"url": url, "api_key": key} for url, key in self.addresses]
        return {"format": FORMAT, **dataclasses.asdict(self), "addresses": addresses}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Sign:
        """`EngineError` for what `to_json` does not write."""
        try:
            if found["format"] != FORMAT:
                raise EngineError(f"{NAME} is of format {found['format']}, expected {FORMAT}; use one release for both")
            values = {field.name: found[field.name] for field in dataclasses.fields(Sign)}
            values["addresses"] = tuple((str(one["url"]), str(one["api_key"])) for one in found["addresses"])
        except (KeyError, TypeError) as error:
            raise EngineError(f"{NAME} is not what an engine's owner writes: {error!r}; start the run again") from error
        return Sign(**values)


class Beacon:
    """The owner's side: writes the file anew whenever `state` has changed and `changed` is called, from any thread.

    state: (reason, version, adapter), asked for at each call. addresses: asked for too, since a restart changes ports.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str,
        dtype: str,
        context_length: int | None,
        addresses: Callable[[], Sequence[tuple[str, str]]],
        state: Callable[[], tuple[str, int | None, str]],
    ) -> None:
        self.path = path
        self._addresses, self._state = addresses, state
        started = started_ticks(os.getpid())
        assert started is not None, "this process runs"
        self._base = Sign(os.getpid(), started, str(Path(model).resolve()), dtype, context_length, (), "", None)
        self._lock = threading.Lock()
        self._written: Sign | None = None
        self._stamp_ns = 0

    def changed(self) -> None:
        """Write what is so now. Where that fails there is no file: readers must not go on by what was so before."""
        with self._lock:
            reason, version, adapter = self._state()
            served = {"reason": reason, "version": version, "adapter": adapter}
            sign = dataclasses.replace(self._base, addresses=tuple(self._addresses()), **served)
            if sign == self._written:
                return
            try:
                self._write(sign)
                self._written = sign
            except OSError:
                self._written = None
                self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The engine is closed. A later `changed` writes the file again."""
        with self._lock:
            self._written = None
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def _write(self, sign: Sign) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            json.dump(sign.to_json(), file)
            file.flush()  # the stamp is to be the last change
            # The kernel's own stamps are coarse: two changes within one tick would look like none.
            self._stamp_ns = max(time.time_ns(), self._stamp_ns + 1)
            os.utime(file.fileno(), ns=(self._stamp_ns, self._stamp_ns))


class Watch:
    """The reader's side. `sign()` costs a stat while nothing changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._sign: Sign | None = None
        self._alive_until = 0.0

    def sign(self) -> Sign:
        """What the file says now, of a process that lives. `EngineError` without one."""
        try:
            found = os.stat(self.path)
            stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
            if self._sign is None or stamp != self._stamp:
                self._sign, self._stamp = self._read(), stamp
                self._alive_until = 0.0
        except OSError as error:
            self._sign = None
            raise EngineError(f"no engine is announced in {self.path.parent}: {error.strerror}") from error
        now = time.monotonic()
        if now >= self._alive_until:
            if started_ticks(self._sign.pid) != self._sign.started:
                raise EngineError(f"the run that announced its engine in {self.path.parent} is gone")
            self._alive_until = now + ALIVE_EVERY_S
        return self._sign

    def _read(self) -> Sign:
        with self.path.open() as file:
            status = os.fstat(file.fileno())
            # Whoever may write it could send prompts to a server of their own.
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise EngineError(
                    f"{self.path} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}; expected yours "
                    "with mode 600"
                )
            try:
                return Sign.from_json(json.load(file))
            except ValueError as error:
                raise EngineError(f"{self.path} is not JSON: {error}") from error


def started_ticks(pid: int) -> int | None:
    """When a process was started, in ticks since the machine's; None if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = text.rpartition(")")[2].split()
    return int(numbers[18]) if state not in "ZX" else None


class Announced:
    """Base of what owns engines: it may serve or says why not (`stale`), and tells it to the readers of a file."""

    engines: Sequence[Any] = ()
    """Those behind this one, where it is several."""
    _stale = ""
    _beacon: Beacon | None = None
    _on_change: Callable[[], None] = staticmethod(lambda: None)

    @property
    def stale(self) -> str:
        """Why it must not serve; empty while it may."""
        return self._stale

    @stale.setter
    def stale(self, reason: str) -> None:
        self._stale = reason
        self._on_change()

    def note_update(self, version: int) -> None:
        """An update begins: stale until it has ended well."""
        self.stale = f"an update to version {version} is under way"

    def announce(self, path: str | Path) -> None:
        """Tell in `path` (`engine.json` in a run's folder) from now until close() where the engine is and whether it
        may be used. Call it after start(). `EngineError` if the file cannot be written."""
        self._withdraw()
        everyone: list[Any] = [self, *self.engines]
        engines = everyone[1:] or everyone
        options = engines[0].options

        def addresses() -> list[tuple[str, str]]:
            return [(f"http://127.0.0.1:{one.server.port}", one.server.api_key) for one in engines]

        def state() -> tuple[str, int | None, str]:
            reason = next((one.stale for one in everyone if one.stale), "")
            return reason, engines[0].version, getattr(engines[0], "adapter", "")

        self._beacon = Beacon(
            Path(path),
            model=options.model_path,
            dtype=options.dtype,
            context_length=options.context_length,
            addresses=addresses,
            state=state,
        )
        for one in everyone:
            one._on_change = self._beacon.changed
        self._beacon.changed()
        if not self._beacon.path.exists():
            raise EngineError(f"{path} cannot be written; others read there whether the engine may be used")

    def _withdraw(self) -> None:
        """The engine is closed, or about to be."""
        if self._beacon is not None:
            self._beacon.remove()
