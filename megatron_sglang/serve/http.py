"""Connections: uvicorn's HTTP/1.1, with bounds on how many there are and how slowly a request may begin.

uvicorn waits for ever for the head of a request, and closes a connection politely even where its client does not read.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_sglang import signals
from megatron_sglang.errors import ConfigError
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.refusal import Refusal

BACKLOG = 16384
HEAD_BYTES = 32768
KEEP_ALIVE_S = 75
GRACE_S = 5
"""For requests under way when the endpoint is told to end; they were told so at once."""

OWN_DESCRIPTORS = 256
_FULL_BODY = Refusal(503, "too many connections", code="too_many_connections").response().body
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)


def raise_descriptor_limit() -> int:
    """To what the system allows; the number of descriptors that this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Protocol(H11Protocol):
    """One connection. `bounded` makes the class for an endpoint."""

    head_s: float
    most: int
    """Connections."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
            return
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        self._abort()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def bounded(limits: Limits, descriptors: int) -> type[Protocol]:
    """uvicorn's protocol with our bounds. Each choice in the engine needs a descriptor too."""
    most = descriptors - limits.concurrency - OWN_DESCRIPTORS
    if most < 64:
        raise ConfigError(
            f"--concurrency={limits.concurrency} leaves too few of {descriptors} file descriptors for connections; "
            "lower it, or raise the system's limit (ulimit -Hn)"
        )
    return type("Bounded", (Protocol,), {"head_s": limits.head_s, "most": most})


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. ConfigError if that cannot be had."""
    if not 0 <= port < 2**16:  # the resolver would take what is left of it by 65536
        raise ConfigError(f"--port={port} is no port; choose one below 65536, or 0 for a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port} cannot be had: {error}; choose another") from error
    return listener


class Server(uvicorn.Server):
    """Serves until told to end by a signal (its number is then in `ended_by`) or by `should_exit`."""

    def __init__(
        self, app: Any, limits: Limits, *, ending: Callable[[], None], ready: Callable[[], None] = lambda: None
    ) -> None:
        """ready, ending: called when it begins and ceases to take requests."""
        http = bounded(limits, raise_descriptor_limit())
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self.ended_by: int | None = None
        self._ready, self._ending = ready, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.ended_by = self.ended_by or sig
        self.should_exit = True

    def until_signal(self, listener: socket.socket) -> int:
        """Serve; the exit status: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP unless nohup has it ignored,
        else 0."""
        with signals.handled(self.handle_exit, *signals.not_ignored(signal.SIGHUP)):  # uvicorn takes over the others
            self.run(sockets=[listener])
        return 128 + self.ended_by if self.ended_by else 0
