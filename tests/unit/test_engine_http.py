"""The client of an engine's HTTP: what concurrent callers can rely on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from megatron_sglang.engine.http import Http

CALLERS = 40
"""More than httpx keeps connections for by default (20)."""


class Meeting(ThreadingHTTPServer):
    """Answers when CALLERS requests are there, so that each has a connection of its own."""

    request_queue_size = 2 * CALLERS
    daemon_threads = True
    met = threading.Barrier(CALLERS)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ports: ClassVar[set[int]] = set()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.ports.add(self.client_address[1])
        self.server.met.wait(30)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None: ...


class Echo(BaseHTTPRequestHandler):
    """Answers the digest of what it was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"sha256": hashlib.sha256(body).hexdigest(), "type": self.headers["Content-Type"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[int]:
    """Its port."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(10)


@pytest.fixture
def port() -> Iterator[int]:
    with serving(Meeting(("127.0.0.1", 0), Answer)) as port:
        yield port


def test_no_connection_is_closed_while_others_ask(port: int) -> None:
    """httpcore closes those above a number of idle ones, among them some that it has just given to a request, which
    then ends with "Bad file descriptor": of 100 callers two in 6,000 requests did."""
    http = Http(port, "user", "admin", lambda: None)
    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in range(3):
            assert list(pool.map(lambda _: http.post("/x", {}, 30.0), range(CALLERS))) == [{}] * CALLERS
    http.close()
    assert len(Answer.ports) == CALLERS


@pytest.mark.parametrize("size", [0, 1000, (1 << 20) - 10, 5_000_000])
def test_a_body_of_any_size_arrives_whole(size: int) -> None:
    """Large ones go in pieces."""
    body = {"text": "".join(chr(97 + number % 26) for number in range(size))}
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as port:
        http = Http(port, "user", "admin", lambda: None)
        answer = http.post("/x", body, 30.0)
        http.close()
    assert answer == {"sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest(), "type": "application/json"}
