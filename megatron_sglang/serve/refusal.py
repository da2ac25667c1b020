"""What a client is told when it does not get an answer, in OpenAI's words.

400 invalid_request_error   what it asks for cannot be done        401   no valid key
404                         no such route or model                 408   the body came too slowly
413                         too large                              429   too many requests; Retry-After
503 service_unavailable     the engine must not serve now; Retry-After
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


def not_valid(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """errors: pydantic's, of the request's body. `param` names the first one's field; a field that may be of several
    types has an error for each, of which the one that leads deepest into it counts."""
    if errors[0]["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {errors[0].get('ctx', {}).get('error', '')}")
    names = [field_of(one, body) for one in errors]
    texts = [
        f"{name or 'body'}: {one['msg'].removeprefix('Value error, ')}" for name, one in zip(names, errors, strict=True)
    ]
    first, *others = names
    deepest = max((name for name in others if name.startswith((f"{first}.", f"{first}["))), key=len, default=first)
    return invalid("; ".join(texts[:3])[:1000], deepest or None)


def field_of(error: Mapping[str, Any], body: Any) -> str:
    """As OpenAI's API names it: messages[0].role; "" for the body itself. error: pydantic's.

    Its path also has a step for the type that was tried where there are several, which leads nowhere in `body`.
    """
    name, here, missing = "", body, error["type"] == "missing"
    _, *steps = error["loc"]
    for place, step in enumerate(steps, 1):
        if here is error["input"] and not missing:
            break
        if isinstance(here, list) and isinstance(step, int):
            name, here = f"{name}[{step}]", here[step]
        elif isinstance(here, dict) and (step in here or (missing and place == len(steps))):
            name, here = f"{name}.{str(step)[:80]}" if name else str(step)[:80], here.get(step)
    return name


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
