"""The endpoint over a socket, before the scriptable engine: what becomes of requests when clients leave, weights
change, engines fail and runs end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve_tools
from engine_tools import script
from serve_tools import (
    CHAT,
    COMPLETIONS,
    EXAMPLE,
    KEY,
    Served,
    error_of,
    idle,
    pace,
    publish,
    serving,
    wait_until,
)

from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.serve.app import Endpoint, make_app
from megatron_sglang.serve.limits import Limits

pytestmark = pytest.mark.timeout(200)


model, run_folder, shared = serve_tools.model, serve_tools.run_folder, serve_tools.shared
engine, plain = serve_tools.engine, serve_tools.plain


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_takes_the_request_along(plain: Served, engine: HttpEngine, stream: bool) -> None:
    """A closed browser tab that goes on sampling up to max_tokens."""
    pace(engine, 0.2)
    body = {"prompt": "a", "n": 3, "max_tokens": 200, "min_tokens": 200, "stream": stream}
    patience = httpx.Timeout(5, read=0.7)
    with (
        plain.client() as client,
        contextlib.suppress(httpx.ReadTimeout),
        client.stream("POST", COMPLETIONS, json=body, timeout=patience) as response,
    ):
        assert next(response.iter_lines()).startswith("data: ")
    began = time.monotonic()
    idle(plain, engine)
    assert time.monotonic() - began < 20  # 39 s of sampling were left


def test_nothing_is_served_between_two_versions(plain: Served, engine: HttpEngine) -> None:
    """Zeroed or half-written weights that answer; and a version that clients cannot tell."""
    body = {"prompt": "a", "max_tokens": 4, "seed": 1}
    before = plain.post(COMPLETIONS, body)
    assert before.json()["weight_version"] == int(before.headers["x-weight-version"]) == engine.version
    version = (engine.version or 0) + 1
    engine.begin_update(version)
    for state in ("under way", "failed", "released"):
        refused = plain.post(COMPLETIONS, body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert state in error_of(refused)["message"]
        with plain.client() as client:
            assert client.get("/health").status_code == 503
            assert client.get("/v1/models").status_code == 200
            assert "megatron_sglang_serving 0.0" in client.get("/metrics").text
        engine.fail_update("a test") if state == "under way" else engine.release() if state == "failed" else None
    publish(engine, fill=1.0)
    after = plain.post(COMPLETIONS, body)
    assert after.json()["weight_version"] == engine.version
    assert after.json()["choices"][0]["text"] != before.json()["choices"][0]["text"]


def test_every_response_names_a_weight_version(plain: Served, engine: HttpEngine, tmp_path: Path) -> None:
    """A client that counts refusals by version, or waits for the next one by /health, would have to ask for models."""
    long = {"prompt": [1] * 250, "max_tokens": 7}

    def versions(served: Served, key: str = KEY) -> dict[tuple[str, int], str | None]:
        with served.client(key) as client:
            found = [client.get(path) for path in ("/health", "/v1/models", "/v1/models/x", "/metrics", "/nowhere")]
            found += [client.post(COMPLETIONS, content=content) for content in (b"{", b" " * (3 << 20))]
            found += [client.post(COMPLETIONS, json=long | more) for more in ({}, {"stream": True}, {"max_tokens": 1})]
        assert all(len(one.headers.get_list("x-weight-version")) <= 1 for one in found)
        return {(one.request.url.path, one.status_code): one.headers.get("x-weight-version") for one in found}

    serves, refuses = versions(plain), versions(plain, "wrong")
    assert {status for _, status in serves} == {200, 400, 404, 413}
    assert {status for _, status in refuses} == {200, 401}
    version = engine.version or 0
    engine.begin_update(version + 1)
    stale = versions(plain)
    assert ("/health", 503) in stale
    assert (COMPLETIONS, 503) in stale
    assert {*serves.values(), *refuses.values(), *stale.values()} == {str(version)}
    publish(engine)
    assert set(versions(plain).values()) == {str(version + 1)}
    with serving(tmp_path) as served:  # no run is known there
        assert set(versions(served).values()) == {None}


def test_an_error_that_nobody_foresaw_names_a_weight_version(run_folder: Path, engine: HttpEngine) -> None:
    """Starlette answers it outside of everything else."""
    app = make_app(Endpoint(run_folder / NAME, KEY, Limits()))

    @app.get("/boom")
    async def boom() -> None:
        raise ZeroDivisionError

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.get("/boom", headers={"Authorization": f"Bearer {KEY}"})

    found = asyncio.run(ask())
    assert (found.status_code, error_of(found)["type"]) == (500, "server_error")
    assert found.headers.get_list("x-weight-version") == [str(engine.version)]


def test_an_update_ends_what_runs(plain: Served, engine: HttpEngine) -> None:
    """An answer of two versions, or one that breaks off as if it had been complete."""
    pace(engine, 0.05)
    body = {"prompt": "a", "max_tokens": 200, "min_tokens": 200}
    with concurrent.futures.ThreadPoolExecutor(2) as pool, plain.client() as client:
        whole = pool.submit(plain.post, COMPLETIONS, body)
        with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            lines = (line for line in response.iter_lines() if line)
            assert json.loads(next(lines).removeprefix("data: "))["weight_version"] == engine.version
            wait_until(lambda: pace(engine, 0.05) == 2)
            publish(engine)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert whole.result().status_code == 503
        assert "send it again" in whole.result().text


def test_two_versions_never_make_one_answer(plain: Served, engine: HttpEngine) -> None:
    """The last line of defence: an engine that stamps one of two choices with another version."""
    for stream in (False, True):
        script(engine, {"path": "/generate", "do": "wrong_version"})
        found = plain.post(COMPLETIONS, {"prompt": "a", "n": 2, "max_tokens": 4, "stream": stream})
        assert "would be mixed" in found.text, found.text
        assert found.status_code == (200 if stream else 503)
        assert "[DONE]" not in found.text


def test_who_waits_for_an_engine_that_stays_away_learns_it(run_folder: Path, engine: HttpEngine) -> None:
    """SGLang holds requests that slip in while it pauses; after a failed update it would for ever."""
    with serving(run_folder, hold_s=0.5) as served, concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200
        engine.pause("abort")  # as begin_update does, seen by nobody yet
        waiting = pool.submit(served.post, COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        wait_until(lambda: served.endpoint.gate.taken == 1)
        engine.fail_update("a test")
        assert waiting.result(10).status_code == 503
        assert "the last update failed: a test" in waiting.result().text


def test_a_run_that_goes_and_comes_again(tmp_path: Path, run_folder: Path, model: Path, engine: HttpEngine) -> None:
    """A SIGKILL of a run removes no file; the next one has other ports and keys, and may have another tokenizer."""
    mine = tmp_path / "model"
    shutil.copytree(model, mine)
    template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    (mine / "chat_template.jinja").write_text(template)
    code = f"""
import sys, time
sys.path.insert(0, "tests/cpu_e2e")
from serve_tools import *
with fake_engine(Path({str(mine)!r})) as run:
    run.announce({str(tmp_path / NAME)!r})
    publish(run)
    print("up", flush=True)
    time.sleep(100)
"""
    body = {"prompt": "a", "max_tokens": 1}
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with serving(tmp_path) as served:
        assert "no engine is announced" in served.post(COMPLETIONS, body).text
        for prefix in ("", "a a a "):
            (mine / "chat_template.jinja").write_text(prefix + template)
            command = [sys.executable, "-c", code]
            run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=EXAMPLE.parents[2])
            try:
                assert run.stdout is not None
                assert run.stdout.readline() == "up\n"
                assert served.post(COMPLETIONS, body).headers["x-weight-version"] == "1"
                assert (served.post(CHAT, chat).json()["usage"]["prompt_tokens"] > 3) == bool(prefix)
            finally:
                run.kill()
                run.wait(20)
        assert (tmp_path / NAME).exists()
        wait_until(lambda: "is gone" in served.post(COMPLETIONS, body).text)
        shutil.copy2(run_folder / NAME, tmp_path / "fresh")
        (tmp_path / "fresh").replace(tmp_path / NAME)
        assert served.post(COMPLETIONS, body).headers["x-weight-version"] == str(engine.version)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_special_token_as_stop_text_ends_the_answer(plain: Served, engine: HttpEngine, stream: bool) -> None:
    """Decoding leaves it out: looked for in the text, <|im_end|> would let an answer run to its limit."""
    body = {"prompt": [5, 6], "max_tokens": 40, "seed": 1, "n": 100, "logprobs": 0, "return_token_ids": True}
    token = 4  # <|fim_pad|>
    free = plain.post(COMPLETIONS, body).json()["choices"]
    place = next(one["index"] for one in free if token in one["token_ids"][1:-1] and 0 not in one["token_ids"])
    ids = free[place]["token_ids"]
    found = plain.post(COMPLETIONS, body | {"stop": ["never", "<|fim_pad|>"], "stream": stream})
    if stream:
        events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == place]
    else:
        parts = [found.json()["choices"][place]]
    assert [one for part in parts for one in part["token_ids"]] == ids[: ids.index(token) + 1]
    assert sum(len(part["logprobs"]["tokens"]) for part in parts) == ids.index(token) + 1
    assert parts[-1]["finish_reason"] == "stop"
    assert free[place]["text"].startswith("".join(part["text"] for part in parts))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["a", "the b"], "n": 2, "logprobs": 2}),
        (COMPLETIONS, {"prompt": [5, 6], "n": 3, "logprobs": 0, "stop": ["never said", "e"]}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3, "logprobs": True, "top_logprobs": 2}),
    ],
    ids=["text", "stops", "chat"],
)
def test_a_stream_says_of_each_choice_what_the_whole_answer_does(
    plain: Served, engine: HttpEngine, path: str, body: dict[str, Any]
) -> None:
    """Choices that come in turns, each in parts: offsets that go on from another choice's, logprobs lost or doubled at
    the seams, texts mixed up."""
    pace(engine, 0.02)  # so that the choices take turns
    body = body | {"max_tokens": 30, "min_tokens": 2, "seed": 5, "return_token_ids": True}
    whole = plain.post(path, body).json()
    found = plain.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = (json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {"))
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    parts: dict[int, list[dict[str, Any]]] = {choice["index"]: [] for choice in whole["choices"]}
    for chunk in chunks:
        [choice] = chunk["choices"]
        parts[choice["index"]].append(choice)
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order), "the choices came one after the other"
    for choice in whole["choices"]:
        of = parts[choice["index"]]
        assert len(of) > 1
        assert "".join(_text(one) for one in of) == _text(choice)
        assert [one["finish_reason"] for one in of] == [None] * (len(of) - 1) + [choice["finish_reason"]]
        assert [token for one in of for token in one["token_ids"]] == choice["token_ids"]
        for key, values in choice["logprobs"].items():
            shown = [one["logprobs"][key] for one in of]
            assert (shown == [None] * len(of)) if values is None else ([it for one in shown for it in one] == values), (
                key
            )
        if path == COMPLETIONS:
            tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
            assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]


def _text(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta", {})).get("content", "")


def test_five_hundred_at_once(plain: Served, engine: HttpEngine) -> None:
    """None lost, none doubled, none mixed up: each answer is that of its own seed."""
    with plain.client() as client:
        bodies = [{"prompt": [n % 500], "seed": n, "max_tokens": 4, "return_token_ids": True} for n in range(500)]
        alone = {n: client.post(COMPLETIONS, json=bodies[n]).json()["choices"][0]["token_ids"] for n in (0, 7, 499)}
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda body: client.post(COMPLETIONS, json=body).json(), bodies))
    assert len({answer["id"] for answer in answers}) == 500
    for n, answer in enumerate(answers):
        assert answer["choices"][0]["prompt_token_ids"] == [n % 500]
        assert n not in alone or answer["choices"][0]["token_ids"] == alone[n]
    counted = f'megatron_sglang_requests_total{{route="{COMPLETIONS}",status="200"}}'
    page = plain.client().get("/metrics").text
    assert float(page.split(counted)[1].split()[0]) >= 503
    idle(plain, engine)
