"""What every request passes before a route sees it: its key, then its body, whole and in time; and what ends it.

A body is read completely before anything is done with it, so a client that sends slowly holds no place. While an answer
is under way the connection is watched: a client that leaves ends its request, one that does not read is cut off.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.meter import Meter
from megatron_sglang.serve.refusal import Refusal, busy

OPEN_ROUTES = ("/health",)
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
"""Names that metrics may have; every other path is "other"."""
VERSION_HEADER = b"x-weight-version"
DISCARD = 16
"""Of a body that is too large up to this many times the allowed size is read and thrown away: a client that was still
sending when its connection closed would not see why it was refused."""


class _Gone(Exception):
    """The client left."""


class Guard:
    """One for an endpoint; `around` puts it into an application. version: the weight version now, if there is one."""

    def __init__(self, api_key: str, limits: Limits, meter: Meter, version: Callable[[], int | None]) -> None:
        self.limits, self.meter, self.version = limits, meter, version
        self.in_flight = 0
        self._key = f"Bearer {api_key}".encode()
        self._held_bytes = 0

    def around(self, app: ASGIApp) -> ASGIApp:
        """Middleware as Starlette adds it."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await _Passage(self, app, scope, receive, send).run()

        return guarded

    def versioned(self, start: Message) -> Message:
        """The head of a response with a weight version: that of a completion, which has it already, or the one that is
        announced now."""
        headers = list(start.get("headers", ()))
        if any(name.lower() == VERSION_HEADER for name, _ in headers) or (version := self.version()) is None:
            return start
        return {**start, "headers": [*headers, (VERSION_HEADER, str(version).encode())]}

    def check_key(self, scope: Scope) -> None:
        """Refusal 401 without the key. Takes as long for a wrong key as for another one."""
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        if scope["path"] not in OPEN_ROUTES and not hmac.compare_digest(given, self._key):
            raise Refusal(
                401, "no valid API key; send it as Authorization: Bearer KEY", code="invalid_api_key", close=True
            )

    def hold(self, size: int) -> None:
        """Refusal 429 when all bodies together are too large."""
        if self._held_bytes + size > self.limits.bodies_bytes:
            raise busy("too many large requests are being served", close=True)
        self._held_bytes += size

    def let_go(self, size: int) -> None:
        """Undo `hold`."""
        self._held_bytes -= size


class _Passage:
    """One request on its way through the guard."""

    def __init__(self, guard: Guard, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.app, self.scope = guard, app, scope
        self._receive, self._send = receive, send
        self._status = 0
        self._complete = False
        self._held = 0
        self._began = time.monotonic()

    async def run(self) -> None:
        """Check key and body, run the application, count how it ended."""
        guard, path = self.guard, self.scope["path"]
        route = path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        guard.in_flight += 1
        try:
            try:
                guard.check_key(self.scope)
                body = await self._body()
            except Refusal as refusal:
                await self._discard(refusal)
                await refusal.response()(self.scope, self._receive, self.send)
                return
            await self._serve(body)
        except _Gone:
            guard.meter.ended.labels("left").inc()
        finally:
            guard.in_flight -= 1
            guard.let_go(self._held)
            if self._complete:
                guard.meter.requests.labels(route, str(self._status)).inc()
                guard.meter.seconds.labels(route).observe(time.monotonic() - self._began)

    async def send(self, message: Message) -> None:
        """To the client, which has `write_s` to make room for it."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message = self.guard.versioned(message)
        try:
            async with asyncio.timeout(self.guard.limits.write_s):
                await self._send(message)
        except TimeoutError:
            self.guard.meter.ended.labels("slow").inc()
            abort: Callable[[], None] | None = self.scope.get("state", {}).get("abort")
            if abort is not None:
                abort()  # close() would wait for the client to read what is left
                await asyncio.sleep(0)
            raise _Gone from None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    async def _body(self) -> bytes:
        limit, parts = self.guard.limits.body_bytes, bytearray()
        refusal = Refusal(413, f"the body is larger than {limit} bytes", code="body_too_large", close=True)
        if self._declared() > limit:
            raise refusal
        try:
            async with asyncio.timeout(self.guard.limits.body_s):
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    if len(parts) + len(part) > limit:
                        raise refusal
                    self.guard.hold(len(part))
                    self._held += len(part)
                    parts += part
                    more = message.get("more_body", False)
        except TimeoutError:
            seconds = self.guard.limits.body_s
            raise Refusal(408, f"the body did not come within {seconds:g} s", code="timeout", close=True) from None
        return bytes(parts)

    def _declared(self) -> int:
        lengths = [value for name, value in self.scope["headers"] if name == b"content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else 0

    async def _discard(self, refusal: Refusal) -> None:
        """Read what a client goes on sending, within bounds: it would lose the answer if the connection broke."""
        if refusal.status not in (401, 413):
            return
        if dict(self.scope["headers"]).get(b"expect", b"").lower() == b"100-continue":
            return  # it waits to be asked for the body, and will not be
        left = DISCARD * self.guard.limits.body_bytes if refusal.status == 413 else self.guard.limits.body_bytes
        try:
            async with asyncio.timeout(self.guard.limits.body_s):
                while left > 0:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    async def _serve(self, body: bytes) -> None:
        """Run the application; end it when the client leaves."""
        scope = dict(self.scope)
        scope["state"] = {**scope.get("state", {}), "began": self._began}
        # A body that is read is JSON, whatever curl calls it.
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*kept, (b"content-type", b"application/json")]
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.get_running_loop().create_future()  # the client is watched below
            raise AssertionError

        work = asyncio.ensure_future(self.app(scope, receive, self.send))
        leaving = asyncio.ensure_future(self._leaving())
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _Gone
            work.result()
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _leaving(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
