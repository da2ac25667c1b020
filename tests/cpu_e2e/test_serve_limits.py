"""What a client may not do: the endpoint's refusals and limits, over a socket, before the scriptable engine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve_tools
from serve_fuzz import Fuzz
from serve_tools import (
    CHAT,
    COMPLETIONS,
    EXAMPLE,
    KEY,
    Served,
    error_of,
    idle,
    pace,
    serving,
    wait_until,
)

from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = pytest.mark.timeout(int(os.environ.get("MEGATRON_SGLANG_TEST_EXAMPLES", "1")) + 200)
EXAMPLES = int(os.environ.get("MEGATRON_SGLANG_TEST_EXAMPLES", "15"))
"""Of the fuzzing, for each kind of request and route; more by hand."""


model, run_folder, shared = serve_tools.model, serve_tools.run_folder, serve_tools.shared
engine, plain = serve_tools.engine, serve_tools.plain


def test_every_route_but_health_wants_the_key(plain: Served, engine: HttpEngine) -> None:
    """A raw SGLang behind one key, or with /metrics and /health_generate open, is what this proxy is to prevent."""
    for key in (b"", b"wrong", KEY[:-1].encode(), KEY.encode() + b"x", "ключ".encode()):
        headers = [(b"authorization", b"Bearer " + key)] if key else []
        with httpx.Client(base_url=plain.url, headers=headers, trust_env=False) as client:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/generate"):
                assert (found := client.get(path)).status_code == 401
                assert error_of(found)["code"] == "invalid_api_key"
            assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 401
            assert client.get("/health").status_code == 200
    with plain.client() as client:
        for path in ("/generate", "/flush_cache", "/server_info", "/update_weights_from_tensor", "/docs", "/v1"):
            assert client.get(path).status_code == 404
            assert client.post(path, json={}).status_code == 404
        assert client.delete(COMPLETIONS).status_code == 405


HARMLESS = {
    "n": None,
    "user": "someone",
    "store": True,
    "metadata": {"a": "b"},
    "logit_bias": {},
    "presence_penalty": 0.0,
    "response_format": {"type": "text"},
    "echo": False,
    "parallel_tool_calls": True,
    "a_field_of_2031": [1],
}

IMPOSSIBLE: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({}, 400, "prompt", "prompt"),
    ({"prompt": []}, 400, "prompt", "prompt"),
    ({"prompt": ""}, 400, "no tokens", "prompt"),
    ({"prompt": [[]]}, 400, "prompt", "prompt[0]"),
    ({"prompt": [-1]}, 400, "prompt", "prompt[0]"),
    ({"prompt": [512]}, 400, "outside the vocabulary", "prompt"),
    ({"prompt": [2**70]}, 400, "outside the vocabulary", "prompt"),
    ({"prompt": [1.5]}, 400, "prompt", "prompt[0]"),
    ({"prompt": [True]}, 400, "prompt", "prompt[0]"),
    ({"prompt": ["a", [1]]}, 400, "prompt", "prompt[0]"),
    ({"prompt": "\ud800"}, 400, "Unicode", "prompt"),
    ({"prompt": "x " * 300}, 400, "context length is 256", "prompt"),
    ({"prompt": [1] * 250, "max_tokens": 7}, 400, "context length is 256", "prompt"),
    ({"prompt": ["a"] * 200}, 400, "200 choices", "prompt"),
    ({"prompt": ["a"] * 100, "n": 2}, 400, "200 choices", "n"),
    ({"prompt": "a", "n": 10**6}, 400, "n", "n"),
    ({"prompt": "a", "n": 0}, 400, "n", "n"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens", "max_tokens"),
    ({"prompt": "a", "max_tokens": 3, "min_tokens": 4}, 400, "min_tokens", "min_tokens"),
    ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "temperature"),
    ({"prompt": "a", "temperature": -0.1}, 400, "temperature", "temperature"),
    ({"prompt": "a", "temperature": "0.5"}, 400, "temperature", "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "top_p"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed", "seed"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "logprobs"),
    ({"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "stop"),
    ({"prompt": "a", "stop": ""}, 400, "stop", "stop"),
    ({"prompt": "a", "stop": "\ufffd"}, 400, "stop", "stop"),
    ({"prompt": "a", "stop": "\n<|fim_pad|>"}, 400, "make the token a stop of its own", "stop"),
    ({"prompt": "a", "stop_token_ids": [512]}, 400, "outside the vocabulary", "stop_token_ids"),
    ({"prompt": "a", "model": "another"}, 404, "is not served", None),
    ({"prompt": "a", "custom_logit_processor": "gASV"}, 400, "custom_logit_processor", "custom_logit_processor"),
    ({"prompt": "a", "lora_path": "/tmp/x"}, 400, "lora_path", "lora_path"),
    ({"prompt": "a", "custom_params": {"a": 1}}, 400, "custom_params", "custom_params"),
    ({"prompt": "a", "image_data": "http://x"}, 400, "image_data", "image_data"),
    ({"prompt": "a", "echo": True}, 400, "echo", "echo"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty"),
    ({"prompt": "a", "stop": ["x", 1]}, 400, "stop", "stop[1]"),
    ({"prompt": "a", "stop": {"str": 1}}, 400, "stop", "stop"),
    ({"prompt": "a", "stop": 1, "stop_token_ids": [-1]}, 400, "stop", "stop"),
    ({"prompt": "a", "stop_token_ids": [3, -1]}, 400, "stop_token_ids", "stop_token_ids[1]"),
    ({"prompt": [1, "a"]}, 400, "prompt", "prompt[1]"),
    ({"prompt": "a", "stream_options": {"include_usage": 3}}, 400, "include_usage", "stream_options.include_usage"),
    ({"prompt": "a", "top_p": 2, "temperature": 3}, 400, "temperature", "temperature"),
]
IMPOSSIBLE_CHATS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "messages", "messages"),
    ({"messages": [{"role": "root", "content": "a"}]}, 400, "role", "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]},
        400,
        "image_url",
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "tool", "content": "4"}]}, 400, "a tool's answer needs its call", "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}, 400, "logprobs", "top_logprobs"),
    ({"messages": [{"role": "user"}], "chat_template": "{{ 1 }}"}, 400, "chat_template", "chat_template"),
    (
        {"messages": [{"role": "user"}], "chat_template_kwargs": {"tokenize": True}},
        400,
        "tokenize",
        "chat_template_kwargs",
    ),
    ({"messages": [{"role": "user"}], "response_format": {"type": "json_object"}}, 400, "grammar", "response_format"),
    ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, 400, "tool_choice", "tool_choice"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "content", "messages[0].content"),
    ({"messages": [{"role": "user"}, {"content": "a"}]}, 400, "role", "messages[1].role"),
    ({"messages": ["a"]}, 400, "messages", "messages[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode", "messages"),
    ({"messages": [{"role": "user"}], "max_completion_tokens": 10**9}, 400, "max_comp", "max_completion_tokens"),
    ({"messages": [{"role": "user"}], "chat_template_kwargs": {"a": []}}, 400, "a", "chat_template_kwargs.a"),
    ({"messages": [{"role": "user"}], "tools": [{"type": "function"}]}, 400, "function", "tools[0].function"),
]


def test_what_cannot_be_done_is_the_clients_error(plain: Served, engine: HttpEngine) -> None:
    """Each of these reaches SGLang, kills it or is silently ignored where nobody looks at it before. `param` is the
    field as OpenAI's API names it; programs look at it to say which of their settings was refused."""
    with plain.client() as client:
        for path, cases in ((COMPLETIONS, IMPOSSIBLE), (CHAT, IMPOSSIBLE_CHATS)):
            for body, status, word, param in cases:
                found = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
                assert found.status_code == status, (body, found.text)
                assert word in error_of(found)["message"], (body, found.text)
                assert error_of(found)["param"] == param, (body, found.text)
        too_long = client.post(COMPLETIONS, json={"prompt": [1] * 257})
        assert error_of(too_long)["code"] == "context_length_exceeded"
        for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b"1" * 5000):
            found = client.post(COMPLETIONS, content=content)
            assert (found.status_code, error_of(found)["param"]) == (400, None), (content[:20], found.text)
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1, **HARMLESS}).status_code == 200
        for depth in (*range(50, 1500, 50), 100_000):  # Python gives up somewhere in between
            nested = '{"a":' * depth + "1" + "}" * depth
            tool = '{"type": "function", "function": {"name": "f", "parameters": ' + nested + "}}"
            found = client.post(CHAT, content='{"messages": [{"role": "user"}], "tools": [' + tool + "]}")
            assert found.status_code == 400, depth
            call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested}}]}
            assert client.post(CHAT, json={"messages": [call], "max_tokens": 1}).status_code == 200, depth


def test_a_model_without_chat_template_says_so(tmp_path: Path, run_folder: Path, engine: HttpEngine) -> None:
    """A built-in default template would give a base model prompts that nobody wrote."""
    record = json.loads((run_folder / NAME).read_text())
    (tmp_path / NAME).touch(0o600)
    (tmp_path / NAME).write_text(json.dumps(record | {"model": str(EXAMPLE)}))
    with serving(tmp_path) as served:
        found = served.post(CHAT, {"messages": [{"role": "user", "content": "a"}]})
        assert (found.status_code, error_of(found)["param"]) == (400, "messages")
        assert "has no chat template" in found.text


def test_large_bodies_are_refused(plain: Served, engine: HttpEngine) -> None:
    """100 MB in memory for each of a thousand connections; and the client must read why, not find a broken pipe."""

    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b" " * (1 << 16)

    with plain.client() as client:
        declared = client.post(COMPLETIONS, content=b" " * (3 << 20))
        assert (declared.status_code, error_of(declared)["code"]) == (413, "body_too_large")
        assert client.post(COMPLETIONS, content=chunks(100)).status_code == 413
        with contextlib.suppress(httpx.TransportError):  # past what is read of it, the connection may break
            assert client.post(COMPLETIONS, content=chunks(1600)).status_code == 413
        assert client.post(COMPLETIONS, json={"prompt": "a" * 100, "max_tokens": 1}).status_code == 200
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-H", f"Authorization: Bearer {KEY}"]
    command += ["--data-binary", "@-", plain.url + COMPLETIONS]
    sent = subprocess.run(command, input=b" " * (8 << 20), capture_output=True, timeout=30)
    assert sent.stdout == b"413", sent  # curl asks before it sends (Expect: 100-continue)
    assert plain.endpoint.guard._held_bytes == 0


def head_of(length: int) -> bytes:
    lines = (f"POST {COMPLETIONS} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def test_slow_clients_hold_nothing_up(run_folder: Path, engine: HttpEngine) -> None:
    """Ten connections that send a byte now and then would otherwise keep the endpoint from everybody else."""
    head = head_of(100)
    with serving(run_folder, head_s=0.6, body_s=0.8, concurrency=1, max_choices=1) as served:
        silent, in_head, in_body = (socket.create_connection(served.address, timeout=10) for _ in range(3))
        with silent, in_head, in_body:
            in_head.sendall(head[:20])
            in_body.sendall(head + b'{"prompt":')
            began = time.monotonic()
            assert served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200
            assert in_body.recv(4096).startswith(b"HTTP/1.1 408 ")
            for closed in (silent, in_head, in_body):
                with contextlib.suppress(ConnectionResetError):
                    while closed.recv(4096):
                        pass
            assert time.monotonic() - began < 5
        idle(served, engine)


def test_a_client_that_does_not_read_is_cut_off(run_folder: Path, engine: HttpEngine) -> None:
    """Its answer would wait in memory, and its request in the engine, for ever."""
    body = json.dumps({"prompt": "a", "n": 64, "max_tokens": 200, "logprobs": 20, "stream": True}).encode()
    with serving(run_folder, write_s=0.5, send_buffer=1 << 16) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(served.address)
        client.sendall(head_of(len(body)) + body)
        wait_until(lambda: served.endpoint.gate.taken == 64)
        idle(served, engine)
        page = served.client().get("/metrics").text
        assert 'megatron_sglang_ended_early_total{why="slow"} 1.0' in page


def test_a_full_queue_says_when_to_come_again(run_folder: Path, engine: HttpEngine) -> None:
    """503s from an overloaded engine, or a queue without end."""
    pace(engine, 0.5)
    body = {"prompt": "a", "max_tokens": 20, "min_tokens": 20}
    with (
        serving(run_folder, concurrency=2, queue=3, max_choices=2) as served,
        concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
        first = [pool.submit(served.post, COMPLETIONS, body) for _ in range(5)]
        wait_until(lambda: (served.endpoint.gate.taken, served.endpoint.gate.waiting) == (2, 3))
        refused = served.post(COMPLETIONS, body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert error_of(refused)["type"] == "rate_limit_error"
        pace(engine, 0.0)
        assert [one.result().status_code for one in first] == [200] * 5
        idle(served, engine)


def test_fuzzing_finds_no_5xx(plain: Served, engine: HttpEngine) -> None:
    """Whatever is sent, it is refused or answered, and the engine is as it was."""
    body = {"prompt": "a", "max_tokens": 8, "seed": 1}
    before = plain.post(COMPLETIONS, body).json()["choices"]
    found = Fuzz(plain, EXAMPLES).run()
    print(json.dumps(dict(sorted(found.items())), indent=1))
    for path in (COMPLETIONS, CHAT):
        assert all(found[f"{kind} {path} 400"] for kind in ("negative", "odd"))
        assert any(found[f"{kind} {path} 200"] for kind in ("positive", "odd")), "everything was refused"
    idle(plain, engine)
    assert plain.post(COMPLETIONS, body).json()["choices"] == before
