"""What the tests of the endpoint share: one over a socket in a thread, and a model folder with a chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_tools import fake_options

from megatron_sglang.buckets import pack
from megatron_sglang.engine import create_engine
from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.http import CONNECTIONS
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.serve import http
from megatron_sglang.serve.app import Endpoint, make_app
from megatron_sglang.serve.limits import Limits

KEY = "test-key-of-32-characters-or-so-"
TEMPLATE = """{%- for tool in tools or [] %}<|fim_prefix|>{{ tool | tojson }}
{% endfor -%}
{%- for message in messages %}
{%- if message.role == "tool" and not message.tool_call_id %}{{ raise_exception("a tool's answer needs its call") }}
{%- endif %}{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}assistant:{% endif -%}
"""


class Served:
    """An endpoint that runs."""

    def __init__(self, endpoint: Endpoint, url: str) -> None:
        self.endpoint, self.url = endpoint, url

    def client(self, key: str = KEY, **more: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        more = {"timeout": 60, "limits": CONNECTIONS} | more
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, **more)

    def post(self, path: str, content: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=content)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


@contextlib.contextmanager
def serving(run_folder: Path, *, send_buffer: int = 0, **limits: Any) -> Iterator[Served]:
    """An endpoint on a free port of loopback, in a thread, for the engine that is announced in `run_folder`.

    send_buffer: bytes that the system keeps for a client that does not read; 0 leaves it to the system.
    """
    bounds = Limits(**limits)
    endpoint = Endpoint(run_folder / NAME, KEY, bounds)
    end_all = endpoint.deadlines.end_all
    server = http.Server(make_app(endpoint), bounds, ending=lambda: end_all("the endpoint is closing"))
    with http.listen("127.0.0.1", 0) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([listener],), name="endpoint")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), 100)
            yield Served(endpoint, "http://{}:{}".format(*listener.getsockname()))
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the endpoint does not end"


def wait_until(done: Callable[[], Any], seconds: float = 20.0) -> None:
    """Or fail."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def with_template(model: Path, folder: Path) -> Path:
    """A copy of a model's small files, with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"


def fake_engine(model: Path) -> HttpEngine:
    """Not started."""
    # The first update imports torch, which takes its time on a busy machine.
    return create_engine(dataclasses.replace(fake_options(update_timeout_s=60.0), model_path=str(model)))


def publish(engine: HttpEngine, fill: float = 0.0) -> int:
    """Weights that are all `fill`, as the next version."""
    version = (engine.version or 0) + 1
    engine.begin_update(version)
    engine.load(pack(version, 0, [("a", torch.full((4,), fill))]))
    engine.commit_update(version, 1)
    return version


def pace(engine: HttpEngine, token_s: float) -> int:
    """No faults; seconds that each token takes. How many requests run."""
    headers = {"Authorization": f"Bearer {engine.server.admin_key}"}
    url = f"http://127.0.0.1:{engine.server.port}/script"
    answer = httpx.post(url, json={"faults": [], "token_s": token_s}, headers=headers, trust_env=False)
    return answer.raise_for_status().json()["running"]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object."""
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def idle(served: Served, engine: HttpEngine) -> None:
    """No request is left, in the endpoint or in the engine, within 10 s."""
    wait_until(lambda: served.endpoint.gate.taken == 0 and served.endpoint.gate.waiting == 0, 10)
    wait_until(lambda: served.endpoint.guard.in_flight == 0, 10)
    engine.reset_prefix_cache()


# ---- fixtures, which a test module takes by giving them a name of its own ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(EXAMPLE, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def shared(model: Path, run_folder: Path) -> Iterator[HttpEngine]:
    with fake_engine(model) as running:
        running.announce(run_folder / NAME)
        yield running


@pytest.fixture
def engine(shared: HttpEngine) -> Iterator[HttpEngine]:
    """A serving engine without faults; afterwards nothing may still run in it."""
    pace(shared, 0.0)
    publish(shared)
    yield shared
    pace(shared, 0.0)
    if not shared.stale:
        shared.reset_prefix_cache()


@pytest.fixture(scope="module")
def plain(run_folder: Path, shared: HttpEngine) -> Iterator[Served]:
    """With default limits, but for those that a test must not wait for."""
    with serving(run_folder, body_bytes=1 << 20) as served:
        yield served
