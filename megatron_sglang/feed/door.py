"""The socket of a run that is fed: one peer, lines with a limit, deadlines."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_sglang.errors import DataError
from megatron_sglang.unix_socket import short_name

NAME = "feed.sock"
"""Of the socket in a run's folder."""

_POLL_S = 0.5
_CHUNK = 1 << 20


class Door:
    """The listening end, for one peer. Not thread-safe.

    Raises `DataError` where the socket cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._pending = bytearray()
        self._peer: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            with short_name(self.path) as name:
                before = os.umask(0o177)
                try:
                    self._listener.bind(name)
                finally:
                    os.umask(before)
            self._listener.listen(1)
        except OSError as error:
            self._listener.close()
            raise DataError(
                f"{self.path} cannot be made: {error}; batches come through it, name another run folder"
            ) from error

    def close(self) -> None:
        """Idempotent; the peer sees the end of the stream."""
        self._listener.close()
        if self._peer is not None:
            self._peer.close()
        self.path.unlink(missing_ok=True)

    def send(self, message: Mapping[str, Any], timeout_s: float = 60.0) -> None:
        """`DataError` if the peer is gone or does not read."""
        assert self._peer is not None, "there is a peer once one was waited for"
        self._peer.settimeout(timeout_s)
        try:
            self._peer.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            _gone(f"it does not take messages: {error!r}")

    def wait_peer(self, deadline: float, idle: Callable[[], None]) -> None:
        """Block until somebody has connected. `idle` is called every half second; deadline: of `time.monotonic`."""
        while self._peer is None:
            _wait_readable(self._listener, deadline, idle, "nobody has connected")
            peer, _ = self._listener.accept()
            if _user_of(peer) != os.geteuid():
                peer.close()
                continue
            self._peer = peer
        # A second one must fail at once instead of waiting for ever.
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def receive(self, limit: int, deadline: float, idle: Callable[[], None]) -> bytes:
        """The next line. `DataError` for one that is longer than `limit` bytes, and when the peer is gone."""
        assert self._peer is not None, "there is a peer once one was waited for"
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            if searched > limit:
                self.send({"refused": f"a message is longer than {limit} bytes; this ends the run"})
                raise DataError(
                    f"the feed's peer sent a message longer than {limit} bytes; no batch of this run is so long"
                )
            _wait_readable(self._peer, deadline, idle, "no batch has come")
            try:
                part = self._peer.recv(_CHUNK)
            except OSError as error:
                _gone(repr(error))
            if not part:
                _gone("it closed the connection")
            self._pending += part
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line


def _wait_readable(source: socket.socket, deadline: float, idle: Callable[[], None], otherwise: str) -> None:
    while not select.select([source], [], [], _POLL_S)[0]:
        idle()
        if time.monotonic() > deadline:
            raise DataError(f"{otherwise} in time; give batches sooner, or raise rollout.environment.timeout_s")


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]


def _gone(how: str) -> NoReturn:
    raise DataError(f"the process that gives batches is gone: {how}; the run ends with it")
