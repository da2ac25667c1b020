"""The routes. What is not here is not served.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{name}   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from megatron_sglang.serve import refusal
from megatron_sglang.serve.gate import Deadlines, Gate
from megatron_sglang.serve.guard import Guard
from megatron_sglang.serve.jobs import Jobs
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.meter import Meter
from megatron_sglang.serve.records import ChatRequest, CompletionRequest, Options
from megatron_sglang.serve.refusal import JsonReply, Refusal
from megatron_sglang.serve.upstream import Upstream
from megatron_sglang.serve.work import Stream, Worker

log = logging.getLogger(__name__)
WATCH_S = 0.2
"""How often the endpoint looks whether its engine may serve."""
OWNER = "megatron-sglang"
_MESSAGES = {404: "no such route", 405: "no such method of this route"}


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What comes with every status but 200."""

    error: ErrorBody


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "Cannot be done",
        401: "No valid key",
        404: "No such model",
        408: "Body came too slowly",
        413: "Too large",
        429: "Too many requests",
        503: "The engine must not serve now",
    }.items()
}


class Endpoint:
    """State of one endpoint, of one event loop; `app` is made of it."""

    def __init__(self, beacon: Path, api_key: str, limits: Limits, served_name: str | None = None) -> None:
        self.limits = limits
        self.jobs = Jobs(limits, served_name)
        self.upstream = Upstream(beacon, limits)
        self.gate = Gate(limits.concurrency, limits.queue)
        self.deadlines = Deadlines(limits.request_s)
        self.meter = Meter()
        self._stale_since: float | None = None
        self._failed = ""
        """What the last look that failed said."""
        self.worker = Worker(self.upstream, self.gate, self.deadlines, self.meter)
        self.guard = Guard(api_key, limits, self.meter, lambda: self.upstream.state()[1])
        self.meter.gauge("in_flight", "Requests that are being read or served", lambda: self.guard.in_flight)
        self.meter.gauge("queued", "Requests that wait for a place", lambda: self.gate.waiting)
        self.meter.gauge("choices_running", "Choices that are in the engine", lambda: self.gate.taken)
        self.meter.gauge("serving", "1 while the engine may serve", lambda: not self.upstream.state()[0])
        self.meter.gauge("weight_version", "Weight version that is served", lambda: self.upstream.state()[1] or 0)

    @contextlib.asynccontextmanager
    async def life(self, _app: FastAPI) -> AsyncGenerator[None]:
        await self._look()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self.deadlines.end_all("the endpoint is closing")
            await self.upstream.aclose()

    async def card(self) -> dict[str, Any]:
        """The model that is served. Refusal 503 while no engine was seen yet."""
        if (bound := self.upstream.known) is None:
            async with self.upstream.use() as bound:
                pass
        sizes = {"max_model_len": bound.most_tokens, "weight_version": self.upstream.state()[1]}
        return {"id": self.jobs.name_of(bound), "object": "model", "created": 0, "owned_by": OWNER, **sizes}

    async def _watch(self) -> None:
        """Meet engines before they are asked. And SGLang holds requests that come while it is paused: if it stays so,
        those who sent them must learn it."""
        while True:
            await asyncio.sleep(WATCH_S)
            await self._look()

    async def _look(self) -> None:
        """End requests that have been held for too long by an engine that does not serve; meet a new engine."""
        try:
            reason, now = self.upstream.state()[0], time.monotonic()
            self._stale_since = None if not reason else now if self._stale_since is None else self._stale_since
            if self._stale_since is not None and now - self._stale_since > self.limits.hold_s:
                self.deadlines.end_all(reason)
            await self.upstream.meet()
        except Exception as error:  # else nobody would look any more
            if repr(error) != self._failed:  # and not five times a second
                log.warning("the endpoint cannot look at its engine: %r", error, exc_info=True)
                self._failed = repr(error)


def make_app(endpoint: Endpoint) -> FastAPI:
    """The ASGI application, guarded."""
    app = FastAPI(
        title="megatron-sglang",
        docs_url=None,
        redoc_url=None,
        lifespan=endpoint.life,
        responses=_REFUSALS,
        strict_content_type=False,
    )
    app.add_middleware(endpoint.guard.around)
    _handle_errors(app, endpoint)
    _completions(app, endpoint)
    _others(app, endpoint)
    return app


def _completions(app: FastAPI, endpoint: Endpoint) -> None:
    async def answer(record: Options, request: Request, prepare: Any) -> Response:
        if record.stream:
            return Stream(endpoint.worker, prepare, request.state.began)
        content, version = await endpoint.worker.whole(prepare)
        return JsonReply(content, headers={"X-Weight-Version": str(version)})

    @app.post("/v1/completions")
    async def completions(record: CompletionRequest, request: Request) -> Response:
        """Continue one text or several. With stream: true, as server-sent events."""
        return await answer(record, request, lambda bound: endpoint.jobs.completion(record, bound))

    @app.post("/v1/chat/completions")
    async def chat_completions(record: ChatRequest, request: Request) -> Response:
        """Answer a conversation. With stream: true, as server-sent events."""
        return await answer(record, request, lambda bound: endpoint.jobs.chat(record, bound))


def _others(app: FastAPI, endpoint: Endpoint) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return JsonReply({"object": "list", "data": [await endpoint.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if (found := await endpoint.card())["id"] != name:
            raise Refusal(404, f"model {name[:200]!r} is not served, but {found['id']!r} is", code="model_not_found")
        return JsonReply(found)

    @app.get("/health")
    async def health() -> Response:
        """200 while completions are served, 503 otherwise. Asks the engine nothing, and needs no key."""
        if endpoint.upstream.state()[0]:
            return JsonReply({"status": "unavailable"}, 503, {"Retry-After": str(refusal.RETRY_STALE_S)})
        return JsonReply({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus, with the key as its bearer token."""
        content, kind = endpoint.meter.page()
        return Response(content, media_type=kind)


def _handle_errors(app: FastAPI, endpoint: Endpoint) -> None:
    """Everything that goes wrong is an error object with a status."""

    @app.exception_handler(Refusal)
    async def refused(_request: Request, error: Exception) -> Response:
        return cast("Refusal", error).response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(_request: Request, error: Exception) -> Response:
        found = cast("RequestValidationError", error)
        return refusal.not_valid(found.errors(), found.body).response()

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: Exception) -> Response:
        status = cast("HTTPException", error).status_code
        told = Refusal(status, _MESSAGES.get(status, "the body is not JSON"))
        told.headers |= cast("HTTPException", error).headers or {}
        return told.response()

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _error: Exception) -> Response:
        answer = Refusal(500, "nobody foresaw this error; see the endpoint's log").response()
        # Starlette sends this one around the guard.
        answer.raw_headers = endpoint.guard.versioned({"headers": answer.raw_headers})["headers"]
        return answer
