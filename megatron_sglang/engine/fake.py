"""A rollout engine without a model: SGLang's HTTP routes, deterministic tokens, real digests, faults by script.

`EngineOptions(kind="fake", extra={...})` starts it in place of SGLang, behind the same supervisor and client. It runs
our own `loader.py` with one parameter dictionary per engine rank, so updates are checked as they are in SGLang.

    extra = {"vocab_size": 512, "faults": [{"path": "/flush_cache", "do": "status", "status": 400, "times": 2}]}

Tokens depend on prompt, seed, position and weights. Faults fire on the `after`-th and later calls of a path, `times`
times; "start" is the path of the start itself. POST /script replaces the faults of a running engine.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import torch

_OPEN_ROUTES = ("/health",)
_USER_ROUTES = ("/generate", "/server_info")


@dataclass(slots=True)
class Fault:
    """What goes wrong on `path`: an HTTP status, a delay, sudden death, a flipped bit in each rank's weights, a
    completion stamped with another version, or a loader that does not answer."""

    path: str
    do: Literal["status", "sleep", "die", "flip_bit", "wrong_version", "no_answer"]
    status: int = 500
    seconds: float = 0.0
    after: int = 0
    times: int = 1


def serve(spec: dict[str, Any], listener: socket.socket) -> None:
    """Serve until killed; the counterpart of `sglang_server.serve`."""
    engine = FakeEngine(spec)
    engine.suffer("start")
    server = _Server(engine)
    server.socket.close()
    server.socket = listener
    server.server_activate()
    server.serve_forever()


class FakeEngine:
    """State of the engine; `answer` maps a request to (status, JSON)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        script = spec["script"]
        self.keys = {False: f"Bearer {spec['api_key']}", True: f"Bearer {spec['admin_key']}"}
        self.vocab_size = int(script.get("vocab_size", 512))
        self.faults = [Fault(**fault) for fault in script.get("faults", [])]
        self.models = [_Parameters() for _ in range(spec["tp_size"])]
        self.version = "default"
        self.released: set[str] = set()
        self.running = 0
        self.lock = threading.Lock()
        self.awake = threading.Event()
        self.awake.set()
        self.routes: dict[str, Callable[[dict[str, Any], dict[str, Fault]], tuple[int, Any]]] = {
            "/script": self.rewrite,
            "/health": self.info,
            "/server_info": self.info,
            "/generate": self.generate,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/flush_cache": self.flush,
            "/update_weights_from_tensor": self.update,
            "/update_weight_version": self.set_version,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
        }

    def suffer(self, path: str) -> dict[str, Fault]:
        """Faults due on this call of `path`, by kind; death and delay happen here."""
        due = {}
        with self.lock:
            for fault in self.faults:
                if fault.path == path:
                    fault.after -= 1
                    if fault.after < 0 < fault.times:
                        fault.times -= 1
                        due[fault.do] = dataclasses.replace(fault)
        if "die" in due:
            print(f"fake engine: scripted death at {path}", file=sys.stderr, flush=True)
            os._exit(17)
        if "sleep" in due:
            ends = time.monotonic() + due["sleep"].seconds
            # A sleeping generation ends early when it is aborted, as a long one in SGLang does.
            while time.monotonic() < ends and (path != "/generate" or self.awake.is_set()):
                time.sleep(0.01)
        return due

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path not in self.routes:
            return 404, {"error": f"no route {path}"}
        with self._counted(path):
            due = self.suffer(path)
            if "status" in due:
                return due["status"].status, {"error": "scripted"}
            return self.routes[path](body, due)

    @contextlib.contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        """Generations wait while paused and count as running; everything else passes."""
        if path != "/generate":
            yield
            return
        self.awake.wait()
        with self.lock:
            self.running += 1
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1

    def info(self, *_: Any) -> tuple[int, Any]:
        return 200, {"version": self.version}

    def rewrite(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        with self.lock:
            self.faults = [Fault(**fault) for fault in body["faults"]]
        return 200, {}

    def pause(self, *_: Any) -> tuple[int, Any]:
        self.awake.clear()
        return 200, {}

    def resume(self, *_: Any) -> tuple[int, Any]:
        self.awake.set()
        return 200, {}

    def flush(self, *_: Any) -> tuple[int, Any]:
        return (400 if self.running else 200), {}

    def set_version(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True}

    def release_memory(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        if self.running or self.released & set(body["tags"]):
            os._exit(18)  # SGLang's schedulers fail an assertion there and take the engine with them
        self.released.update(body["tags"])
        return 200, None

    def resume_memory(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        if not self.released >= set(body["tags"]):
            os._exit(18)
        self.released.difference_update(body["tags"])
        return 200, None

    def generate(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        version = "999" if "wrong_version" in due else self.version
        pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
        return 200, [self.complete(prompt, sampling, version) for prompt, sampling in pairs]

    def complete(self, prompt: list[int], sampling: dict[str, Any], version: str) -> dict[str, Any]:
        seed = sampling["sampling_seed"] if sampling["temperature"] > 0 else None
        ids: list[int] = []
        logprobs: list[tuple[float, int, None]] = []
        finish: dict[str, Any] = {"type": "length"}
        for position in range(sampling["max_new_tokens"]):
            if not self.awake.is_set():
                finish = {"type": "abort"}
                break
            drawn = hashlib.sha256(f"{prompt} {seed} {position} {self.models[0].salt}".encode()).digest()
            ids.append(int.from_bytes(drawn[:8]) % self.vocab_size)
            logprobs.append((-1.0 - drawn[8] / 256, ids[-1], None))
            if ids[-1] in sampling["stop_token_ids"]:
                finish = {"type": "stop", "matched": ids[-1]}
                break
        meta = {"finish_reason": finish, "output_token_logprobs": logprobs, "weight_version": version}
        return {"output_ids": ids, "meta_info": meta}

    def update(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        from megatron_sglang.engine import loader

        for model, payload in zip(self.models, body["serialized_named_tensors"], strict=True):
            if "no_answer" in due:
                continue
            # Only the holder of the admin key gets here, and that is the trainer that started us.
            [(envelope, data)] = pickle.loads(base64.b64decode(payload))
            if "flip_bit" in due and data.numel():
                data[data.numel() // 2] ^= 1
            loader.load(model, [(envelope, data)])
        self.models[0].salt = hashlib.sha256(repr(sorted(self.models[0].digests().items())).encode()).hexdigest()
        return 200, {"success": True, "message": "Success"}


class _Parameters:
    """The least that `loader.load` asks of a model: any name is a parameter of that name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.salt = ""

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.tensors.update((name, tensor.clone()) for name, tensor in weights)

    def digests(self) -> dict[str, int]:
        from megatron_sglang.digests import digest

        return {name: digest(tensor) for name, tensor in self.tensors.items()}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.engine = engine


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        assert isinstance(self.server, _Server)
        path, engine = urlsplit(self.path).path, self.server.engine
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = engine.keys[path not in _USER_ROUTES]
        if path not in _OPEN_ROUTES and self.headers.get("Authorization") != wanted:
            status, reply = 401, {"error": "Unauthorized"}
        else:
            status, reply = engine.answer(path, json.loads(body) if body else {})
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: requests are the client's to log."""
