"""Which engine serves, seen from the endpoint: what `engine.json` announces (engine/beacon.py), client and tokenizer.

The file is looked at before each request. A run that ended and came again, with other ports or another model, is
taken up by itself; requests under way keep the client that they started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_sglang.engine.beacon import Sign, Watch
from megatron_sglang.engine.client import Address, EngineClient
from megatron_sglang.errors import DataError, EngineError
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.refusal import Refusal, stale
from megatron_sglang.serve.tokens import Tokens

log = logging.getLogger(__name__)
INFO_S = 10.0
"""How long an engine may take to tell its sizes."""
AGAIN_S = 5.0
"""How long an engine that could not be used is left alone before it is tried again."""
UNUSABLE = "the engine that is announced cannot be used; see the endpoint's log"
INPUT_MARGIN = 5
"""Tokens that SGLang's scheduler keeps free of a prompt (managers/tp_worker.py: max_req_input_len)."""


@dataclass(slots=True, eq=False)
class Bound:
    """An engine that can be asked."""

    sign: Sign
    tokens: Tokens
    client: EngineClient
    most_tokens: int
    """Prompt and completion together, by the model and by the size of the engine's cache."""
    most_prompt: int
    users: int = 0


class Upstream:
    """The engine that engine.json (`path`) announces, whichever that is at the moment. For one event loop."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.limits = limits
        self._watch = Watch(path)
        self._bound: Bound | None = None
        self._binding = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._failed: tuple[tuple[Any, ...], float] = ((), 0.0)
        """Which engine could not be used, and when it may be tried again."""

    def state(self) -> tuple[str, int | None]:
        """(why there are no completions now or "", weight version)."""
        try:
            sign = self._watch.sign()
        except EngineError as error:
            return str(error), None
        return sign.reason, sign.version

    @property
    def known(self) -> Bound | None:
        """The last engine, whether it may serve or not."""
        return self._bound

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncGenerator[Bound]:
        """The engine, while it may serve. Refusal 503 otherwise."""
        sign = self._sign()
        if sign.reason:
            raise stale(sign.reason)
        bound = self._bound
        if bound is None or _identity(bound.sign) != _identity(sign):
            bound = await self._bind()
        bound.users += 1
        try:
            yield bound
        finally:
            bound.users -= 1
            self._close_if_idle(bound)

    async def meet(self) -> None:
        """Get to know the engine that is announced, if it is another one than before: its tokenizer takes seconds."""
        with contextlib.suppress(Refusal):
            if self._bound is None or _identity(self._bound.sign) != _identity(self._sign()):
                await self._bind()

    async def aclose(self) -> None:
        bound, self._bound = self._bound, None
        if bound is not None:
            await bound.client.aclose()
        await asyncio.gather(*self._closing)

    def _sign(self) -> Sign:
        try:
            return self._watch.sign()
        except EngineError as error:
            raise stale(str(error)) from error

    async def _bind(self) -> Bound:
        """Take up the engine that is announced now; one request does it while others wait. Refusal 503 if it cannot."""
        async with self._binding:
            old = self._bound
            sign = self._sign()
            try:
                if old is not None and _identity(old.sign) == _identity(sign):  # another request did it
                    return old
                if self._failed[0] == _identity(sign) and time.monotonic() < self._failed[1]:
                    raise stale(UNUSABLE)
                self._bound = bound = await self._meet(sign, old)
            except (EngineError, DataError) as error:
                self._failed = (_identity(sign), time.monotonic() + AGAIN_S)
                log.warning("%s", error)
                raise stale(UNUSABLE) from error
        if old is not None:
            self._close_if_idle(old)
        return bound

    async def _meet(self, sign: Sign, old: Bound | None) -> Bound:
        """Load the tokenizer, ask for the engines' sizes, make a client. An engine that was started again within a run
        has the tokenizer of `old`; a run that comes again may have another one in the same folder."""
        if old is not None and _identity(old.sign)[:-1] == _identity(sign)[:-1]:
            tokens = old.tokens
        else:
            tokens = await asyncio.to_thread(Tokens.load, sign.model, sign.context_length)
        infos = [await _info(url, key) for url, key in sign.addresses]
        most = [one["max_req_input_len"] for one in infos if isinstance(one.get("max_req_input_len"), int)]
        client = EngineClient(
            [Address(url, key) for url, key in sign.addresses],
            decode=tokens.decode,
            timeout_s=self.limits.request_s,
            concurrency=self.limits.concurrency,
            refuse=lambda: self.state()[0],
            eos_token_ids=tokens.eos_token_ids,
            adapter=lambda: self._watch.sign().adapter,
            version=lambda: self._watch.sign().version,
        )
        # SGLang takes prompts shorter than max_req_input_len; a completion ends where its cache or the context does.
        most_prompt = min([tokens.context_length - 1, *(limit - 1 for limit in most)])
        most_tokens = min([tokens.context_length, *(limit + INPUT_MARGIN for limit in most)])
        return Bound(sign, tokens, client, most_tokens, most_prompt)

    def _close_if_idle(self, bound: Bound) -> None:
        if bound is not self._bound and bound.users == 0:
            task = asyncio.create_task(bound.client.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _identity(sign: Sign) -> tuple[Any, ...]:
    """What tells one start of an engine from another; reason and version change while it is the same."""
    return sign.pid, sign.started, sign.model, sign.context_length, sign.addresses


async def _info(url: str, key: str) -> dict[str, Any]:
    """An engine's own account of its sizes."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=INFO_S) as http:
            reply = await http.get(f"{url}/server_info", headers={"Authorization": f"Bearer {key}"})
            reply.raise_for_status()
            return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"the engine at {url} does not say its sizes: {error!r}") from error
