"""What a client is told when it does not get an answer, in OpenAI's words.

400 invalid_request_error   what it asks for cannot be done        401   no valid key
404                         no such route or model                 408   the body came too slowly
413                         too large                              429   too many requests; Retry-After
503 service_unavailable     the engine must not serve now; Retry-After
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

RETRY_BUSY_S = 1
RETRY_STALE_S = 2
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}


class Refusal(Exception):
    """Ends a request with `status` and one error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if close:
            # What is left of the request is not read, so nothing can follow it on this connection.
            self.headers["Connection"] = "close"

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JsonReply(self.body(), self.status, self.headers)


class JsonReply(Response):
    """JSON in ASCII: texts may hold halves of characters, which UTF-8 does not have."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    return Refusal(400, message, param=param, code=code)


def too_long(tokens: int, wanted: int, limit: int, param: str) -> Refusal:
    """A prompt, or a prompt with the completion that is asked for, beyond the context."""
    asked = f"{tokens + wanted} tokens ({tokens} in the prompt, {wanted} for the completion)"
    return invalid(
        f"this model's context length is {limit} tokens, but {asked} were asked for; ask for less",
        param,
        "context_length_exceeded",
    )


def stale(reason: str) -> Refusal:
    """The engine must not serve now, or has failed."""
    return Refusal(503, f"no completions now: {reason}", code="engine_unavailable", retry_after_s=RETRY_STALE_S)


def busy(what: str, *, close: bool = False) -> Refusal:
    """Too much is under way; close: the request was not read to its end."""
    return Refusal(429, f"{what}; try again later", code="rate_limit_exceeded", retry_after_s=RETRY_BUSY_S, close=close)
