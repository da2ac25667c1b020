"""Requests that nobody would write, by schemathesis from the endpoint's own OpenAPI schema, and by hand."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from serve_tools import CHAT, COMPLETIONS, KEY, Served

VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {
        "model": "tiny",
        "prompt": "def f(a):",
        "max_tokens": 3,
        "n": 1,
        "seed": 1,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "min_tokens": 1,
        "logprobs": 1,
        "stop": ["\n\n"],
        "stop_token_ids": [3],
        "stream": True,
        "stream_options": {"include_usage": True},
        "session_id": "s",
        "return_token_ids": True,
        "echo": False,
        "logit_bias": {},
    },
    CHAT: {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "4", "tool_call_id": "c"},
        ],
        "max_completion_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": False,
        "seed": 1,
    },
}
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf")]
LARGE = ["a" * 5000, "é" * 300, "\u202e\u0000", "<|endoftext|>", "{{ 7*7 }}", [0] * 300, [511], [512], ["a"] * 129]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", "\x00", "\ud800", "\ufffd", [], {}, [[]], [None], [{}], {"": None}]),
    st.sampled_from(NUMBERS),
    st.sampled_from(LARGE),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


@st.composite
def mutations(draw: st.DrawFn, path: str) -> bytes:
    """A valid body with a few places made odd; sometimes cut or damaged afterwards."""
    body = copy.deepcopy(VALID[path])
    for _ in range(draw(st.integers(1, 3))):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(ODD)
            break
    content = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 3)) :]
    return content


class Fuzz:
    """Counts the statuses that come, by kind of request. Fails at a 5xx, or an error that is not OpenAI's object."""

    def __init__(self, served: Served, examples: int) -> None:
        """examples: for each kind of request and each route."""
        self.served = served
        self.found: Counter[str] = Counter()
        self.settings = hypothesis.settings(
            max_examples=examples,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

    def run(self) -> Counter[str]:
        """What the schema allows, what it does not, and odd values, for each route."""
        with self.served.client() as client:
            schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
            for operation in (one.ok() for one in schema.get_all_operations()):
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    self.by_schema(operation, mode)
            for path in VALID:
                self.by_hand(client, path)
        return self.found

    def by_schema(self, operation: Any, mode: GenerationMode) -> None:
        @self.settings
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body.pop("model", None)  # any other name ends it too early
            reply = case.call(base_url=self.served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            self.judge(f"{mode.value} {case.path}", reply.status_code, reply.text)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # a route that takes nothing
            send()

    def by_hand(self, client: httpx.Client, path: str) -> None:
        @self.settings
        @hypothesis.given(content=mutations(path))
        def send(content: bytes) -> None:
            reply = client.post(path, content=content)
            self.judge(f"odd {path}", reply.status_code, reply.text)

        send()

    def judge(self, kind: str, status: int, text: str) -> None:
        self.found[f"{kind} {status}"] += 1
        assert status < 500, (kind, text)
        if status == 200:
            assert not text.startswith('{"error"'), text
            assert 'data: {"error"' not in text, text
        else:
            assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}, text
