"""HTTP to one engine on this machine: two keys, a deadline on everything, and retries only where nothing can change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import tenacity

from megatron_sglang.errors import EngineDiedError, EngineError, EngineTimeoutError

DYING_S = 10.0
"""How long a server whose connection broke gets to end, so that the error can say what ended it."""

CONNECTIONS = httpx.Limits(max_connections=100, max_keepalive_connections=100)
"""All are kept. Above that number httpcore 1.0.9 closes idle ones, and one that it has just given to another thread's
request counts as idle until that thread runs: the request ends with "Bad file descriptor" (connection_pool.py:293)."""

_retry_connect = tenacity.retry(
    # Nothing was sent yet, so even a request that changes state may be tried again.
    retry=tenacity.retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
    wait=tenacity.wait_exponential(multiplier=0.05, max=1.0),
    stop=tenacity.stop_after_attempt(4),
    reraise=True,
)


class _Pieces:
    """A body, piece by piece: httpcore 1.0.9 copies what is left of one after each send (_backends/sync.py:137). That
    was half of the time of a bucket of 400 MB by value."""

    BYTES = 1 << 20

    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._body), self.BYTES):
            yield bytes(self._body[start : start + self.BYTES])


class Deadline:
    """What is left of the time of a call that takes several messages."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends = time.monotonic() + seconds

    def left(self, path: str) -> float:
        """Seconds for the next message. `EngineTimeoutError` when there are none, before it is sent."""
        if self.is_over():
            raise EngineTimeoutError(
                f"engine took all of {self.seconds:g} s for what comes before {path}, which was not sent; see its log, "
                "or allow more time"
            )
        return self._ends - time.monotonic()

    def is_over(self, in_s: float = 0.0) -> bool:
        """Now, or in so many seconds."""
        return time.monotonic() + in_s >= self._ends


def was_sent(error: EngineTimeoutError) -> bool:
    """Whether the engine may have got the message that it did not answer in time."""
    return not isinstance(error.__cause__, httpx.ConnectTimeout)


class Http:
    """Thread-safe client. `why_dead` gives the reason if the server's process has ended, else None."""

    def __init__(
        self, port: int, api_key: str, admin_key: str, why_dead: Callable[[], str | None], *, url: str = ""
    ) -> None:
        self._keys = {False: {"Authorization": f"Bearer {api_key}"}, True: {"Authorization": f"Bearer {admin_key}"}}
        self._why_dead = why_dead
        # trust_env would send loopback traffic through a proxy.
        self._client = httpx.Client(base_url=url or f"http://127.0.0.1:{port}", trust_env=False, limits=CONNECTIONS)

    def get(self, path: str, timeout_s: float, admin: bool = False, **query: Any) -> httpx.Response:
        """Any status; the caller judges it."""
        return self._send("GET", path, timeout_s, admin, params=query)

    def post(self, path: str, body: dict[str, Any], timeout_s: float, admin: bool = True) -> Any:
        """Decoded JSON of a 200, None for an empty body; `EngineError` otherwise."""
        content = json.dumps(body, allow_nan=False).encode()
        described = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        response = self._send("POST", path, timeout_s, admin, content=_Pieces(content), headers=described)
        if (status := response.status_code) != 200:
            raise EngineError(f"engine answered {path} with {status}, expected 200: {response.text[:500]}")
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise EngineError(f"engine answered {path} with no valid JSON: {response.text[:200]!r}") from error

    def close(self) -> None:
        self._client.close()

    def _wait_dead(self) -> str | None:
        """SGLang takes seconds to end after a rank has failed, and only its last words say which."""
        deadline = time.monotonic() + DYING_S
        while (reason := self._why_dead()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return reason

    @_retry_connect
    def _connect_and_send(self, request: httpx.Request) -> httpx.Response:
        return self._client.send(request)

    def _send(
        self, method: str, path: str, timeout_s: float, admin: bool, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0))
        headers = self._keys[admin] | (headers or {})
        request = self._client.build_request(method, path, headers=headers, timeout=timeout, **more)
        try:
            return self._connect_and_send(request)
        except httpx.TimeoutException as error:
            raise EngineTimeoutError(f"engine did not answer {path} within {timeout_s:g} s; see its log") from error
        except httpx.TransportError as error:
            if reason := self._wait_dead():
                raise EngineDiedError(f"engine died during {path}: {reason}") from error
            raise EngineError(f"connection to the engine broke during {path}: {error!r}; see its log") from error
