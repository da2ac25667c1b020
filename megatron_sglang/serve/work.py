"""One request from its record to its answer: a place, the engine, and one weight version for all of it, or none.

What an update ends midway, and what would mix two versions, is refused with 503, or by an error event where a stream
has begun. Whoever leaves takes the request out of the queue and out of the engine: everything here runs in the task
that serves the connection, or in tasks that end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_sglang.engine.client import EngineClient
from megatron_sglang.errors import ConfigError, EngineError, EngineStaleError
from megatron_sglang.serve import answers
from megatron_sglang.serve.answers import Form, Sampled
from megatron_sglang.serve.gate import Deadlines, Gate
from megatron_sglang.serve.meter import Meter
from megatron_sglang.serve.refusal import Refusal, invalid, stale
from megatron_sglang.serve.upstream import Bound, Upstream
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

log = logging.getLogger(__name__)
AHEAD = 64
"""Pieces that may wait for a client that reads more slowly than the engine samples."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a request comes to, once its engine is known."""

    form: Form
    requests: tuple[GenerateRequest, ...]
    """By choice."""
    include_usage: bool = False


Prepare = Callable[[Bound], Awaitable[Job]]


class Worker:
    """Answers requests of one endpoint."""

    def __init__(self, upstream: Upstream, gate: Gate, deadlines: Deadlines, meter: Meter) -> None:
        self.upstream, self.gate, self.deadlines, self.meter = upstream, gate, deadlines, meter

    async def whole(self, prepare: Prepare) -> tuple[dict[str, Any], int]:
        """The answer and its weight version. Refusal where there is none."""
        async with self.deadlines.bound(), self._place(prepare) as (job, client):
            found = await _all_of([client.generate(request) for request in job.requests])
            version = Version()
            for one in found:
                version.see(one)
            self._count(job, sum(len(one.token_ids_T) for one in found))
            return job.form.whole([_sampled(one) for one in found], version.number), version.number

    async def events(self, prepare: Prepare) -> AsyncGenerator[tuple[bytes, int]]:
        """The events of a stream, each with the weight version so far. Refusal also midway. The caller bounds it."""
        async with self._place(prepare) as (job, client):
            form, version, count = job.form, Version(), 0
            begun: set[int] = set()
            async with contextlib.aclosing(_merged(client, job.requests)) as pieces:
                async for index, piece in pieces:
                    version.see(piece)
                    count += len(piece.token_ids_T)
                    new, first = _sampled(piece), index not in begun
                    if form.shows(new, first=first):
                        begun.add(index)
                        chunk = form.chunk(index, new, version.number, first=first)
                        yield answers.event(chunk), version.number
            if job.include_usage:
                yield answers.event(form.last_chunk(count, version.number)), version.number
            yield answers.DONE, version.number
            self._count(job, count)

    @contextlib.asynccontextmanager
    async def _place(self, prepare: Prepare) -> AsyncGenerator[tuple[Job, EngineClient]]:
        """An engine, the request prepared for it, and a place in it; what the engine raises inside becomes a
        Refusal."""
        async with self.upstream.use() as bound:
            job = await prepare(bound)
            async with self.gate.admit(len(job.requests)):
                with _as_refusals():
                    yield job, bound.client

    def _count(self, job: Job, completion_tokens: int) -> None:
        self.meter.tokens.labels("prompt").inc(sum(map(len, job.form.prompts)))
        self.meter.tokens.labels("completion").inc(completion_tokens)


class Stream(Response):
    """Server-sent events. The head is sent with the first of them, so a request that is refused before gets its status,
    and the weight version in the head is the one that samples."""

    def __init__(self, worker: Worker, prepare: Prepare, began: float) -> None:
        super().__init__(media_type="text/event-stream")
        self.worker, self.prepare, self.began = worker, prepare, began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._started = False
        try:
            # Not in the generator: a timeout ends the task where it is, which may be in `send`.
            async with self.worker.deadlines.bound():
                await self._stream(send)
        except Refusal as refusal:
            if not self._started:
                await refusal.response()(scope, receive, send)
                return
            self.worker.meter.ended.labels("broken").inc()
            await send(_body(answers.event(refusal.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, send: Send) -> None:
        async with contextlib.aclosing(self.worker.events(self.prepare)) as events:
            async for content, version in events:
                if not self._started:
                    self._started = True
                    self.worker.meter.first_token.observe(time.monotonic() - self.began)
                    await send(self._head(version))
                await send(_body(content))

    def _head(self, version: int) -> dict[str, Any]:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-weight-version", str(version).encode()),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


class Version:
    """The weight version of one answer: the first that is seen. Refusal if another one follows, or if a part of the
    answer was aborted."""

    def __init__(self) -> None:
        self.number = -1

    def see(self, new: Any) -> None:
        """new: a Completion or a Piece."""
        if new.finish_reason == "abort":
            raise stale("a weight update ended this request; send it again")
        versions = {*getattr(new, "versions_T", ()), new.weight_version} - {-1}
        if self.number != -1:
            versions.add(self.number)
        if len(versions) > 1:
            raise stale(f"weight versions {sorted(versions)} would be mixed in one answer; send it again")
        self.number = max(versions, default=-1)


def requests_of(
    prompts: Sequence[tuple[int, ...]], choices_each: int, sampling: SamplingParams, seed: int | None, session_id: str
) -> tuple[GenerateRequest, ...]:
    """By choice: those of the first prompt, those of the second, ... Choice 0 has `seed` itself where it is one of 31
    bits; the other seeds follow from it. Without a seed they are random."""
    start = secrets.randbits(62) if seed is None else seed
    return tuple(
        GenerateRequest(prompt, replace(sampling, seed=choice_seed(start, number)), session_id)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(choices_each))
    )


def choice_seed(seed: int, number: int) -> int:
    """31-bit seed of choice `number`. Not seed + number: requests with near seeds would repeat each other's choices."""
    if number == 0 and 0 <= seed < 2**31:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{number}".encode(), digest_size=4).digest()) >> 1


def _sampled(new: Any) -> Sampled:
    return Sampled(new.text, new.token_ids_T, new.logprobs_T, new.top_logprobs_T, new.finish_reason)


@contextlib.contextmanager
def _as_refusals() -> Generator[None]:
    """What the engine's client raises, as what a client of ours may know: no paths, no lines of logs."""
    try:
        yield
    except EngineStaleError as error:
        raise stale(str(error)) from error
    except EngineError as error:
        log.warning("%s: %s", type(error).__name__, error)
        raise stale("the engine failed; see the endpoint's log") from error
    except ConfigError as error:
        raise invalid(str(error)) from error


async def _all_of(works: Sequence[Awaitable[Completion]]) -> list[Completion]:
    """All results, or the first error, when nothing of the rest runs any more."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _merged(client: EngineClient, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Any]]:
    """Pieces of all choices as they come, each with its choice's number."""
    if len(requests) == 1:
        async with contextlib.aclosing(client.stream(requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(AHEAD)

    async def run(index: int, request: GenerateRequest) -> None:
        try:
            async with contextlib.aclosing(client.stream(request)) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
        except Exception as error:  # noqa: BLE001 - also what nobody foresaw: the reader would wait for its deadline
            await queue.put((index, error))

    tasks = [asyncio.create_task(run(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish_reason is not None
            yield index, piece
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
