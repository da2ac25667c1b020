"""Places in the engine, given in the order of asking, and an end for what waits or runs too long; of one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator

from megatron_sglang.serve.refusal import busy, stale


class Gate:
    """`places` choices at the same time, `queue` requests that wait; nobody overtakes."""

    def __init__(self, places: int, queue: int) -> None:
        self.places, self.queue = places, queue
        self.taken = 0
        self.waiting = 0
        self._turns: deque[tuple[asyncio.Future[None], int]] = deque()
        """Who waits, with the number of choices, in order. Those who gave up stay in it until it is their turn."""

    @contextlib.asynccontextmanager
    async def admit(self, choices: int) -> AsyncGenerator[None]:
        """Hold `choices` places (at most all of them). Refusal 429 where the queue is full."""
        assert choices <= self.places, "the limits say so"
        if self.waiting or self.taken + choices > self.places:
            if self.waiting >= self.queue:
                raise busy(f"{self.waiting} requests are waiting already")
            await self._wait(choices)
        else:
            self.taken += choices
        try:
            yield
        finally:
            self.taken -= choices
            self._advance()

    async def _wait(self, choices: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append((turn, choices))
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self.waiting -= 1
            else:  # it had its places already
                self.taken -= choices
            self._advance()
            raise

    def _advance(self) -> None:
        while self._turns:
            turn, choices = self._turns[0]
            if not turn.done():
                if self.taken + choices > self.places:
                    return
                self.taken += choices
                self.waiting -= 1
                turn.set_result(None)
            self._turns.popleft()


class Deadlines:
    """Bounds the requests under way, one by one by time and all of them together by a reason."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._open: dict[asyncio.Timeout, str] = {}

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.asynccontextmanager
    async def bound(self) -> AsyncGenerator[None]:
        """Around one request. Refusal 503 when its time is over, or with the reason of `end_all`."""
        scope = asyncio.timeout(self.seconds)
        try:
            async with scope:
                self._open[scope] = f"the request was not done within {self.seconds:g} s"
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise stale(self._open[scope]) from error
        finally:
            self._open.pop(scope, None)

    def end_all(self, reason: str) -> None:
        """Every request under way ends at once."""
        for scope in self._open:
            if not scope.expired():
                self._open[scope] = reason
                scope.reschedule(0.0)
