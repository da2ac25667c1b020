"""/generate of one engine over asynchronous HTTP: a deadline on everything, named errors, and an end at any point.

A request ends early in one of three ways: by /abort_request, which needs SGLang's admin key and lets it answer with
what it has; by closing its stream, at once and without that key, because SGLang ends what nobody listens to; and one
that is not streamed by closing its connection, which SGLang sees after up to four seconds.

aiohttp and not httpx, which looks through all its connections several times for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megatron_sglang.engine import answers
from megatron_sglang.engine.answers import Answer
from megatron_sglang.engine.http import DYING_S
from megatron_sglang.errors import EngineDiedError, EngineError, EngineTimeoutError

CONNECT_S = 5.0
SESSION_HEADER = "X-SMG-Routing-Key"
"""By it sglang-router knows what belongs together."""
KEEP_S = 2.0
"""How long an idle connection is kept: less than SGLang keeps it (external engines 5 s, ours `server.KEEP_ALIVE_S`),
which would close it under a request."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where one engine serves."""

    url: str
    """http://127.0.0.1:PORT"""
    api_key: str = field(repr=False)
    admin_key: str = field(default="", repr=False)
    """SGLang wants it for /abort_request. Without it every completion is streamed, and ended by closing its stream."""
    routed: bool = False
    """A router (`router.py`), which answers itself for an engine that is gone."""


@dataclass(slots=True, eq=False)
class Running:
    """One completion from the call to its end."""

    streamed: bool
    every: int = 1
    """Tokens in each event of its stream."""
    http: AsyncHttp | None = None
    """Of the engine that has it; None while it waits for a place."""
    rid: str = ""
    session_id: str = ""
    aborted: bool = False
    waiting: asyncio.Timeout | None = None
    """Around what waits for the engine; None while the caller has the word."""
    response: aiohttp.ClientResponse | None = None
    """The stream that it reads."""

    @property
    def closes(self) -> bool:
        """Whether it is ended by closing its stream, which loses what was not sent yet; else by /abort_request."""
        return self.http is not None and not self.http.address.admin_key

    def abort(self) -> None:
        """Have it end: at once where it can be closed, else when the engine says so or before its next step."""
        self.aborted = True
        if self.closes and self.waiting is not None:
            if not self.waiting.expired():
                self.waiting.reschedule(0.0)
        elif self.closes and self.response is not None:
            self.response.close()


class AsyncHttp:
    """For one event loop. why_dead: the reason if the engine's process has ended; None where nobody can tell."""

    def __init__(
        self, address: Address, connections: int, timeout_s: float, why_dead: Callable[[], str | None] | None
    ) -> None:
        self.address, self.timeout_s, self._why_dead = address, timeout_s, why_dead
        self.load = 0
        """Completions that it works on."""
        self._ending: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            address.url,
            headers={"Authorization": f"Bearer {address.api_key}"},
            # A few more, so that an abort never waits for what it is to end.
            connector=aiohttp.TCPConnector(limit=connections + 16, keepalive_timeout=KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=False,
        )

    def ask(self, one: Running, body: dict[str, Any]) -> AsyncGenerator[Answer]:
        """Answers to one request, the last with a finish_reason. Close it when leaving early: that ends the request."""
        return self._streamed(one, body) if one.streamed else self._whole(one, body)

    async def abort(self, rid: str) -> None:
        """Tell the engine to end a request; nothing happens where it is not known (yet)."""
        headers = {"Authorization": f"Bearer {self.address.admin_key}"}
        limit = aiohttp.ClientTimeout(total=CONNECT_S)
        # An engine that is gone has aborted everything.
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await (await self._session.post("/abort_request", json={"rid": rid}, headers=headers, timeout=limit)).read()

    async def aclose(self) -> None:
        """Close all connections; idempotent."""
        await asyncio.gather(*self._ending)
        await self._session.close()

    async def _whole(self, one: Running, body: dict[str, Any]) -> AsyncGenerator[Answer]:
        try:
            async with self._wait(one, self._deadline()):
                response = await self._send(one, body)
                content = await response.read()
        except (asyncio.CancelledError, EngineTimeoutError):
            ending = asyncio.create_task(self.abort(one.rid))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise
        if response.status == answers.ABORTED:
            yield answers.NOTHING
            return
        await self._require_ok(response.status, content)
        yield answers.read(json.loads(content), 0, body.get("routed_experts_start_len"))

    async def _streamed(self, one: Running, body: dict[str, Any]) -> AsyncGenerator[Answer]:
        deadline = self._deadline()
        known = 0
        try:
            async with self._wait(one, deadline):
                one.response = response = await self._send(one, body | {"stream": True})
                if response.status != 200:
                    await self._require_ok(response.status, await response.read())
            events = _events(response.content.iter_any())
            while True:
                async with self._wait(one, deadline):
                    event = await anext(events, None)
                if event is None:
                    raise EngineError("engine ended a stream before its completion had ended; see its log")
                answer = answers.read(event, known, body.get("routed_experts_start_len"))
                known += len(answer.token_ids_T)
                if answer.finish_reason is not None:
                    # A connection that was read to its end can be used again; if that fails, it is closed.
                    with contextlib.suppress(_AbortedError, EngineError):
                        async with self._wait(one, deadline):
                            await anext(events, None)
                    yield answer
                    return
                yield answer
        except _AbortedError:
            yield answers.NOTHING
        finally:
            if one.response is not None:
                one.response.close()
                one.response = None

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_s

    @contextlib.asynccontextmanager
    async def _wait(self, one: Running, deadline: float) -> AsyncGenerator[None]:
        """Around what waits for the engine: a deadline, errors that say what happened, and the end by `abort`."""
        if one.aborted and one.closes:
            raise _AbortedError
        try:
            async with asyncio.timeout_at(deadline) as scope:
                one.waiting = scope
                try:
                    yield
                finally:
                    one.waiting = None
        except aiohttp.ClientError as error:  # before TimeoutError, because that of a connect is both
            if one.aborted and one.closes:
                raise _AbortedError from None
            if (reason := await self._wait_dead()) is not None:
                raise EngineDiedError(f"engine died during /generate: {reason}") from error
            raise EngineError(
                f"connection to the engine at {self.address.url} broke during /generate: {error!r}; see its log"
            ) from error
        except TimeoutError as error:
            if one.aborted and one.closes:
                raise _AbortedError from None
            raise EngineTimeoutError(
                f"engine did not finish a completion within {self.timeout_s:g} s; see its log, or raise the limit"
            ) from error

    async def _wait_dead(self) -> str | None:
        """SGLang takes seconds to end after a rank has failed, and only its last words say which."""
        deadline = asyncio.get_running_loop().time() + DYING_S
        while self._why_dead is not None and asyncio.get_running_loop().time() < deadline:
            if (reason := self._why_dead()) is not None:
                return reason
            await asyncio.sleep(0.1)
        return None

    async def _send(self, one: Running, body: dict[str, Any]) -> aiohttp.ClientResponse:
        headers = {}
        if self.address.routed and one.session_id:  # hashed: a client of the endpoint may call its session anything
            headers[SESSION_HEADER] = hashlib.blake2b(one.session_id.encode(), digest_size=16).hexdigest()
        for pause in (0.05, 0.1, 0.2, 0.4):
            # Nothing was sent yet, so it may be tried again.
            with contextlib.suppress(aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                return await self._session.post("/generate", json=body, headers=headers)
            await asyncio.sleep(pause)
        return await self._session.post("/generate", json=body, headers=headers)

    async def _require_ok(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        if self.address.routed and status >= 500 and (reason := await self._wait_dead()) is not None:
            raise EngineDiedError(f"engine died during /generate: {reason}")
        text = content[:500].decode(errors="replace")
        raise EngineError(f"engine answered /generate with {status}, expected 200: {text}")


class _AbortedError(Exception):
    """A stream was closed by `Running.abort`."""


async def _events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any]]:
    """The JSON values of server-sent events, up to [DONE]."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data != b"[DONE]":
                yield json.loads(data)
