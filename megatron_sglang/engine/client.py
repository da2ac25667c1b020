"""Many requests at once: the asynchronous client of running engines, with exact stops; `interfaces.AsyncEngine`.

    async with engine.client(tokenizer.decode) as client:
        completions = await asyncio.gather(*(client.generate(request) for request in requests))
        async with contextlib.aclosing(client.stream(request)) as pieces:
            async for piece in pieces: ...

Each completion is one HTTP request to SGLang's /generate, or two with min_new_tokens, under its own request id. Those
with stop texts are streamed, decoded and matched as they come (`stops.py`) and ended at the token that completes the
text. A caller that is cancelled, or leaves a stream, ends its request in the engine. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from megatron_sglang import routing
from megatron_sglang.engine import answers
from megatron_sglang.engine.answers import Answer
from megatron_sglang.engine.async_http import Address, AsyncHttp, Running
from megatron_sglang.engine.controls import require_loaded
from megatron_sglang.errors import ConfigError, EngineError, EngineStaleError, EngineTimeoutError
from megatron_sglang.stops import Decode, StopMatcher
from megatron_sglang.types import Completion, FinishReason, GenerateRequest, RoutedExperts, SamplingParams

__all__ = ["Address", "EngineClient", "Piece"]

ABORT_AGAIN_S = 0.25
"""An abort that overtakes its request finds nothing to end, and is sent again after so long."""


EVENT_TOKENS = 8
"""Tokens in each event of a stream that only `generate` reads. A stop text is noticed up to 7 tokens late, and these
are cut off; single tokens in each event would cost SGLang's one tokenizer process more than the 7."""

SESSIONS = 65536
"""Sessions that a client remembers: those that were silent the longest are forgotten."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one completion. Of the last piece `finish_reason` is set."""

    token_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    text: str
    """Newly decoded text that is certainly part of the answer, without stop texts and stop tokens: "" while it may be
    the start of a stop text or a cut character. Only where the client has `decode`."""
    finish_reason: FinishReason | None
    matched: int | str | None
    """The stop token or stop text that ended it."""
    weight_version: int
    """-1 where it is not known: in the empty last piece of an aborted completion."""
    top_logprobs_T: tuple[Mapping[int, float], ...] = ()
    routed_experts: RoutedExperts | None = None
    """Of all tokens of this HTTP request, with its last piece."""


class EngineClient:
    """For one event loop. Raises `EngineError`, and `EngineStaleError` while the engine must not serve.

    addresses      of the engines; or a function that gives them, where they may be started again on other ports
    decode         token ids -> text; needed for stop texts, and gives `Piece.text` and `Completion.text`
    timeout_s      for one HTTP request; waiting for one of the `concurrency` places is not counted
    refuse         why the engine must not serve now, "" while it may
    why_dead       of the engine at an address, the reason if its process has ended, else None
    eos_token_ids  tokens that end any completion of this model (`controls.eos_token_ids`); needed for min_new_tokens
    adapter        name of the one that serves requests which name none; "" for none
    version        weight version that the engine serves with that adapter; None where it is not known
    unloaded       names of adapters that must not be asked for
    """

    def __init__(
        self,
        addresses: Sequence[Address] | Callable[[], Sequence[Address]],
        *,
        decode: Decode | None = None,
        timeout_s: float = 600.0,
        concurrency: int = 1024,
        refuse: Callable[[], str] = lambda: "",
        why_dead: Callable[[Address], str | None] | None = None,
        eos_token_ids: Collection[int] | None = None,
        adapter: Callable[[], str] = lambda: "",
        version: Callable[[], int | None] = lambda: None,
        unloaded: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self.decode, self.timeout_s, self.concurrency = decode, timeout_s, concurrency
        self._locate = addresses if callable(addresses) else lambda: addresses
        self._refuse, self._why_dead, self._eos = refuse, why_dead, eos_token_ids
        self._adapter, self._version, self._unloaded = adapter, version, unloaded
        self._places = asyncio.Semaphore(concurrency)
        self._running: set[Running] = set()
        self._https: dict[Address, AsyncHttp] = {}
        self._homes: dict[str, str] = {}
        """Session -> URL of its engine; the session that was used last is at the end."""
        if not self._locate():
            raise ConfigError("an engine client needs the address of at least one engine")

    # ---- requests ----

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Aborted (here, or by a weight update) it is what was sampled until then, as "abort"."""
        stops = bool(request.sampling.stop)
        one = Running(streamed=stops, every=EVENT_TOKENS)
        pieces = [piece async for piece in self._pieces(one, request, self._matcher(request, stops))]
        completion = _joined(pieces)
        if self.decode is None or stops:
            return completion
        ids_T = completion.token_ids_T
        return replace(completion, text=self.decode(ids_T[:-1] if pieces[-1].matched is not None else ids_T))

    def stream(self, request: GenerateRequest) -> AsyncGenerator[Piece]:
        """The completion as it comes. Close it when leaving early (contextlib.aclosing), which ends the request."""
        wanted = self.decode is not None or bool(request.sampling.stop)
        return self._pieces(Running(streamed=True), request, self._matcher(request, wanted))

    @property
    def running(self) -> int:
        """Requests that have not ended, those that wait for a place too."""
        return len(self._running)

    async def abort(self) -> None:
        """End every request of this client that still runs or waits; each returns what it has, as "abort".

        Returns when all have ended, but for streams whose caller is busy elsewhere. `EngineTimeoutError` after
        `timeout_s`.
        """
        mine = list(self._running)
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        for one in mine:
            one.abort()
        told: set[str] = set()
        # A stream whose caller is busy elsewhere (`waiting` is None) need only have been told to end in the engine:
        # here it ends when the caller asks for its next piece.
        while still := [one for one in mine if one in self._running and (one.waiting or one.rid not in told)]:
            if asyncio.get_running_loop().time() > deadline:
                raise EngineTimeoutError(
                    f"{len(still)} of {len(mine)} requests did not end within {self.timeout_s:g} s of their abort"
                )
            in_engine = [(one.http, one.rid) for one in still if one.http is not None and one.rid]
            await asyncio.gather(*(http.abort(rid) for http, rid in in_engine if http.address.admin_key))
            told.update(rid for _, rid in in_engine)
            again = asyncio.get_running_loop().time() + ABORT_AGAIN_S
            while any(one in self._running for one in still) and asyncio.get_running_loop().time() < again:
                await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        """End what runs and close all connections; idempotent."""
        with contextlib.suppress(EngineError):
            await self.abort()
        https, self._https = self._https, {}
        await asyncio.gather(*(http.aclose() for http in https.values()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # ---- steps ----

    def _matcher(self, request: GenerateRequest, wanted: bool) -> StopMatcher | None:
        """What decodes tokens and looks for stop texts as they arrive; None where that is not wanted."""
        sampling = request.sampling
        if not wanted:
            return None
        if self.decode is None:
            raise ConfigError(
                f"stop texts {list(sampling.stop)} need the text of what is sampled; give the client `decode`, for "
                "instance a tokenizer's decode, or use stop_token_ids"
            )
        matcher = StopMatcher(sampling.stop, self.decode, ignore_first=sampling.min_new_tokens)
        if request.stop_from is not None:
            matcher.feed(request.token_ids_T[request.stop_from :])
        return matcher

    async def _pieces(
        self, one: Running, request: GenerateRequest, matcher: StopMatcher | None
    ) -> AsyncGenerator[Piece]:
        """The pieces of one completion: wait for a place, choose an engine, and match what it answers."""
        phases = self._phases(request.sampling)
        if request.routing_from is not None and request.sampling.stop:
            raise ConfigError(
                f"stop texts {list(request.sampling.stop)} cut a completion before its end, where SGLang tells the "
                "experts; end it by stop_token_ids, or leave routing_from out"
            )
        one.session_id = request.session_id
        self._running.add(one)
        try:
            async with self._places:
                one.http = self._choose(request.session_id)
                one.streamed = one.streamed or one.closes
                one.http.load += 1
                try:
                    async with contextlib.aclosing(self._answers(one, one.http, request, phases)) as found:
                        async for answer in found:
                            yield (piece := _piece(answer, matcher))
                            if piece.finish_reason is not None:
                                return
                finally:
                    one.http.load -= 1
        finally:
            self._running.discard(one)

    def _phases(self, sampling: SamplingParams) -> list[tuple[int, frozenset[int]]]:
        """The HTTP requests that make up one completion, each as (most tokens, token ids that must not be drawn).

        SGLang refuses min_new_tokens without a tokenizer. So a first request samples that many tokens while all that
        could end the completion is forbidden, and a second one goes on from there.
        """
        most, least = sampling.max_new_tokens, sampling.min_new_tokens
        if least <= 0:
            return [(most, frozenset())]
        if least > most:
            raise ConfigError(f"min_new_tokens={least} is more than max_new_tokens={most}; lower it")
        if self._eos is None:
            raise ConfigError(
                f"min_new_tokens={least} needs the tokens that end a completion in this model; give the client "
                "eos_token_ids, as an engine's `client()` does"
            )
        first = (least, frozenset(sampling.stop_token_ids) | frozenset(self._eos))
        return [first, (most - least, frozenset())] if most > least else [first]

    def _choose(self, session_id: str) -> AsyncHttp:
        """The engine that has the session, as long as it is there; else the one with the fewest requests."""
        https = [self._http(address) for address in self._locate()]
        least = min(http.load for http in https)
        idlest = [http for http in https if http.load == least]
        if not session_id:
            return idlest[0]
        home = self._homes.pop(session_id, "")
        there = [http for http in https if http.address.url == home]
        # Of equally idle ones that which rendezvous hashing picks: a later client of the same engines picks it as well.
        found = there[0] if there else max(idlest, key=lambda http: _rendezvous(session_id, http.address.url))
        self._homes[session_id] = found.address.url
        if len(self._homes) > SESSIONS:
            del self._homes[next(iter(self._homes))]
        return found

    def _http(self, address: Address) -> AsyncHttp:
        if address not in self._https:
            why_dead = self._why_dead
            reason = None if why_dead is None else (lambda: why_dead(address))
            self._https[address] = AsyncHttp(address, self.concurrency, self.timeout_s, reason)
        return self._https[address]

    async def _answers(
        self, one: Running, http: AsyncHttp, request: GenerateRequest, phases: Sequence[tuple[int, frozenset[int]]]
    ) -> AsyncGenerator[Answer]:
        """The engine's answers, up to the first one that has a finish_reason."""
        version = None
        if not request.adapter and (adapter := self._adapter()):
            request, version = replace(request, adapter=adapter), self._version()
        prompt = request.token_ids_T
        for number, (tokens, forbidden) in enumerate(phases):
            reason = self._refuse()
            if one.aborted or (reason and number):
                yield answers.NOTHING
                return
            if reason:
                raise EngineStaleError(f"engine must not serve: {reason}; publish a weight version first")
            require_loaded(request.adapter, self._unloaded())
            one.rid = uuid.uuid4().hex  # all of one length: SGLang aborts whatever *starts* with an id
            part = replace(request, token_ids_T=prompt, sampling=replace(request.sampling, max_new_tokens=tokens))
            if number and request.routing_from is not None:  # the last token of the request before is the next one
                part = replace(part, routing_from=len(prompt) - 1)
            body = answers.body_of(part, one.rid, forbidden=forbidden, every=one.every)
            more = number + 1 < len(phases)
            async with contextlib.aclosing(http.ask(one, body)) as found:
                async for answer in found:
                    _require_version(answer, version, request.adapter)
                    prompt += answer.token_ids_T
                    yield replace(answer, finish_reason=None) if more and answer.finish_reason == "length" else answer


def _require_version(answer: Answer, version: int | None, adapter: str) -> None:
    """`EngineStaleError` where adapter and weight version of an answer do not belong together: a paused engine holds a
    request with the adapter that it came with, and may go on with a later version."""
    if version is not None and answer.token_ids_T and answer.weight_version != version:
        raise EngineStaleError(
            f"the engine held a request until weight version {answer.weight_version} and sampled it by adapter "
            f"{adapter!r}, which is version {version}; send it again"
        )


def _rendezvous(session_id: str, url: str) -> bytes:
    """An engine's rank for a session: the largest hash of both wins (Thaler and Ravishankar 1998)."""
    return hashlib.blake2b(f"{session_id}\0{url}".encode(), digest_size=8).digest()


def _piece(answer: Answer, matcher: StopMatcher | None) -> Piece:
    """An answer as a piece: decoded, and cut behind the token that completes a stop text."""
    text, matched, keep = "", answer.matched, len(answer.token_ids_T)
    finish = answer.finish_reason
    if matcher is not None:
        before = matcher.kept
        text = matcher.feed(answer.token_ids_T[:-1] if matched is not None else answer.token_ids_T)
        if matcher.matched is not None:
            finish, matched, keep = "stop", matcher.matched, matcher.kept - before
        elif finish is not None:
            text += matcher.finish()
    return Piece(
        answer.token_ids_T[:keep],
        answer.logprobs_T[:keep],
        text,
        finish,
        matched,
        answer.weight_version,
        answer.top_logprobs_T[:keep],
        answer.routed_experts,
    )


def _joined(pieces: Sequence[Piece]) -> Completion:
    """All pieces of a completion as one."""

    def flat(name: str) -> tuple[Any, ...]:
        return tuple(item for piece in pieces for item in getattr(piece, name))

    versions_T = tuple(piece.weight_version for piece in pieces for _ in piece.token_ids_T)
    finish = pieces[-1].finish_reason
    assert finish is not None, "a completion has ended"
    return Completion(
        flat("token_ids_T"),
        flat("logprobs_T"),
        finish,
        versions_T[-1] if versions_T else answers.NO_VERSION,
        text="".join(piece.text for piece in pieces),
        versions_T=versions_T if len(set(versions_T)) > 1 else (),
        top_logprobs_T=flat("top_logprobs_T"),
        routed_experts=routing.joined(piece.routed_experts for piece in pieces),
    )
