"""A rollout engine without a model: SGLang's HTTP routes, deterministic tokens, real digests, faults by script.

`EngineOptions(kind="fake", extra={...})` starts it in place of SGLang, behind the same supervisor and client. It runs
our own `loader.py` with one parameter dictionary per engine rank, so updates are checked as they are in SGLang.

    extra = {"vocab_size": 512, "faults": [{"path": "/flush_cache", "do": "status", "status": 400, "times": 2}]}

    extra = {"token_s": 0.01}    # each token takes so long

Tokens depend on prompt, seed, position and weights. Faults fire on the `after`-th and later calls of a path, `times`
times; "start" is the path of the start itself. POST /script replaces faults and pace of a running engine.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from megatron_sglang.engine.fake_model import Parameters, Sampler, grouped, routed_experts, singles

_OPEN_ROUTES = ("/health",)
_USER_ROUTES = ("/generate", "/server_info", "/model_info", "/v1/models")


@dataclass(slots=True)
class Fault:
    """What goes wrong on `path`: an HTTP status, a delay, sudden death, a flipped bit in each rank's weights, a
    completion stamped with another version, a loader that does not answer, or memory that comes back without what was
    in it, as a GPU's does."""

    path: str
    do: Literal["status", "sleep", "die", "flip_bit", "wrong_version", "no_answer", "forget"]
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
        self.described = dict(script.get("server_info", {}))
        """What /server_info says otherwise."""
        self.models = [Parameters(spec.get("model_folder")) for _ in range(spec["tp_size"])]
        self.routed: str | None = spec.get("routed_experts")
        """Folder of the model whose experts it tells; None: of none."""
        self.version = "default"
        self.released: set[str] = set()
        self.running = 0
        self.frozen = False  # paused, with requests kept where they are
        self.token_s = float(script.get("token_s", 0.0))
        self.rids: set[str] = set()
        self.aborted: set[str] = set()
        self.adapters: dict[str, str] = {}  # all that were ever loaded, and their folders
        self.lock, self.flushing = threading.Lock(), threading.Lock()
        self.awake = threading.Event()
        self.awake.set()
        self.routes: dict[str, Callable[[dict[str, Any], dict[str, Fault]], tuple[int, Any]]] = {
            "/script": self.rewrite,
            "/health": self.info,
            "/server_info": self.server_info,
            "/model_info": self.model_info,
            "/generate": self.generate,
            "/abort_request": self.abort,
            "/load_lora_adapter": self.load_adapter,
            "/unload_lora_adapter": self.unload_adapter,
            "/v1/models": self.list_models,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/flush_cache": self.flush,
            "/update_weights_from_tensor": self.update,
            "/update_weight_version": self.set_version,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
        }

    def suffer(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Fault]:
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
            while time.monotonic() < ends and (
                path != "/generate" or (self.awake.is_set() and (body or {}).get("rid") not in self.aborted)
            ):
                time.sleep(0.01)
        return due

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path not in self.routes:
            return 404, {"error": f"no route {path}"}
        with self.counted(path, body):
            due = self.suffer(path, body)
            if "status" in due:
                return due["status"].status, {"error": "scripted"}
            return self.routes[path](body, due)

    @contextlib.contextmanager
    def counted(self, path: str, body: dict[str, Any]) -> Iterator[None]:
        """Generations wait while paused and count as running; everything else passes."""
        if path != "/generate":
            yield
            return
        rid = body.get("rid", "")
        with self.lock:
            self.rids.add(rid)
        try:
            self.awake.wait()
            with self.lock:
                self.running += 1
            try:
                yield
            finally:
                with self.lock:
                    self.running -= 1
        finally:
            with self.lock:
                self.rids.discard(rid)
                self.aborted.discard(rid)

    def info(self, *_: Any) -> tuple[int, Any]:
        return 200, {"version": self.version}

    def server_info(self, *_: Any) -> tuple[int, Any]:
        from megatron_sglang.engine.options import LOADER
        from megatron_sglang.engine.server import SGLANG_VERSION

        sizes = {"tp_size": len(self.models), "ep_size": 1, "dp_size": 1, "pp_size": 1, "dtype": "auto"}
        return 200, {"version": SGLANG_VERSION, "custom_weight_loader": [LOADER], **sizes, **self.described}

    def model_info(self, *_: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def rewrite(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        with self.lock:
            self.faults = [Fault(**fault) for fault in body["faults"]]
            self.token_s = body.get("token_s", 0.0)
            return 200, {"running": self.running}

    def pause(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        self.frozen = body.get("mode", "abort") != "abort"
        self.awake.clear()
        return 200, {}

    def resume(self, *_: Any) -> tuple[int, Any]:
        self.awake.set()
        self.frozen = False
        return 200, {}

    def flush(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        """One after the other, each waits so long for requests to end, whoever listens: SGLang's flush_wrapper.py."""
        with self.flushing:
            ends = time.monotonic() + float(body.get("timeout", 0.0))
            while self.running and time.monotonic() < ends:
                time.sleep(0.01)
            return (400 if self.running else 200), {}

    def set_version(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        if "new_version" not in body:
            return 422, {"error": "new_version is missing"}
        self.version = body["new_version"]
        return 200, {"success": True}

    def release_memory(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        if self.running or self.released & set(body["tags"]):
            os._exit(18)  # SGLang's schedulers fail an assertion there and take the engine with them
        self.released.update(body["tags"])
        return 200, None

    def resume_memory(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        if not self.released >= set(body["tags"]):
            os._exit(18)
        for model in self.models if "forget" in due and "weights" in body["tags"] else ():
            model.forget()
        self.released.difference_update(body["tags"])
        return 200, None

    def generate(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        if not body["input_ids"]:
            return 400, {"error": {"message": "input_ids cannot be empty."}}
        if isinstance(body["sampling_params"], list):
            replies = [self._finished(one, due) for one in singles(body)]
            return next((reply for reply in replies if reply[0] != 200), (200, [reply for _, reply in replies]))
        return self._finished(body, due)

    def _finished(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        """All of one completion in one reply."""
        if refusal := self.refusal(body):
            return refusal
        [whole] = grouped(self.events(body, due), None)
        return 200, whole

    def refusal(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        """What SGLang would not serve."""
        sampling = body["sampling_params"]
        if body.get("rid") in self.aborted:
            return 499, {"error": {"message": f"Request {body['rid']} was aborted"}}
        if sampling.get("stop") or sampling.get("min_new_tokens"):
            return 400, {"error": {"message": "unavailable when skip_tokenizer_init=True"}}
        name = body.get("lora_path")
        if name and name not in self.adapters:
            return 400, {"error": {"message": f"Got LoRA adapter that has never been loaded: {name}"}}
        if name and name not in self.models[0].adapters:  # as SGLang's _resolve_lora_path does, without a word
            self.load_adapter({"lora_name": name, "lora_path": self.adapters[name]}, {})
        return None

    def events(self, body: dict[str, Any], due: dict[str, Fault]) -> Iterator[dict[str, Any]]:
        """One completion, token by token; only what is new in each, as with incremental_streaming_output."""
        sampling = body["sampling_params"]
        ended = set() if sampling.get("ignore_eos") else set(sampling.get("stop_token_ids") or ())
        sampler = Sampler(self.vocab_size, self.models[0].salt, body)
        finish: dict[str, Any] | None = None
        count = 0
        while finish is None:
            row: list[Any] = []
            top: list[list[Any]] = []
            time.sleep(self.token_s)
            if self.frozen:
                self.awake.wait()
            if not self.awake.is_set() or body.get("rid") in self.aborted:
                finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            else:
                row, top = sampler.draw()
                count += 1
                if row[1] in ended:
                    finish = {"type": "stop", "matched": row[1]}
                elif count >= sampling["max_new_tokens"]:
                    finish = {"type": "length", "length": count}
            meta = {
                "finish_reason": finish,
                "prompt_tokens": len(body["input_ids"]),
                "completion_tokens": count,
                "output_token_logprobs": [row] if row else [],
                "output_top_logprobs": [top] if top else [],
                "weight_version": "999" if "wrong_version" in due else self.version,
            }
            if finish and self.routed and body.get("return_routed_experts"):
                meta["routed_experts"] = routed_experts(self.routed, sampler.ids, body["routed_experts_start_len"])
            yield {"output_ids": [row[1]] if row else [], "meta_info": meta}

    def abort(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        """SGLang ends every request whose id starts with this one, and knows of no others."""
        with self.lock:
            rid = body.get("rid") or ""
            self.aborted |= {one for one in self.rids if body.get("abort_all") or (rid and one.startswith(rid))}
        return 200, None

    def load_adapter(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        name = body["lora_name"]
        if name in self.models[0].adapters:
            return 400, {"success": False, "error_message": f"LoRA adapter {name} is already loaded"}
        self.adapters[name] = body["lora_path"]
        for model in self.models:
            model.load_adapter(name, body["lora_path"])
        return 200, {"success": True}

    def list_models(self, *_: Any) -> tuple[int, Any]:
        loaded = [{"id": name, "parent": "base"} for name in sorted(self.models[0].adapters)]
        return 200, {"object": "list", "data": [{"id": "base", "parent": None}, *loaded]}

    def unload_adapter(self, body: dict[str, Any], _: dict[str, Fault]) -> tuple[int, Any]:
        known = [model.adapters.pop(body["lora_name"], None) is not None for model in self.models]
        return (200 if all(known) else 400), {"success": all(known)}

    def update(self, body: dict[str, Any], due: dict[str, Fault]) -> tuple[int, Any]:
        from concurrent.futures import ThreadPoolExecutor

        if "no_answer" not in due:
            with ThreadPoolExecutor(len(self.models)) as ranks:  # in a broadcast they wait for each other
                flips = ["flip_bit" in due] * len(self.models)
                list(ranks.map(_load, self.models, body["serialized_named_tensors"], flips))
        self.models[0].renew_salt()
        return 200, {"success": True, "message": "Success"}


def _load(model: Parameters, payload: str, flip_bit: bool) -> None:
    """One message to one engine rank."""
    from megatron_sglang.engine import loader

    # Only the holder of the admin key gets here, and that is the trainer that started us.
    [(envelope, data)] = pickle.loads(base64.b64decode(payload))
    if flip_bit and data.numel():
        data[data.numel() // 2] ^= 1
    loader.load(model, [(envelope, data)])


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.engine = engine


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True  # each event of a stream at once, not after 40 ms

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        assert isinstance(self.server, _Server)
        (_, _, path, query, _), engine = urlsplit(self.path), self.server.engine
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = engine.keys[path not in _USER_ROUTES]
        if path not in _OPEN_ROUTES and self.headers.get("Authorization") != wanted:
            status, reply = 401, {"error": "Unauthorized"}
        else:
            value = json.loads(body) if body else dict(parse_qsl(query))
            if path == "/generate" and value.get("stream"):
                self._stream(engine, value)
                return
            status, reply = engine.answer(path, value)
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, engine: FakeEngine, body: dict[str, Any]) -> None:
        """Server-sent events; a listener that leaves ends the request, as it does in SGLang."""
        with engine.counted("/generate", body), contextlib.suppress(ConnectionError):
            due = engine.suffer("/generate", body)
            if "status" in due:
                self.send_error(due["status"].status)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            refusal = engine.refusal(body)
            every = body["sampling_params"].get("stream_interval") or 1
            events = grouped(engine.events(body, due), every) if refusal is None else [_stream_error(*refusal)]
            for event in events:
                self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
            return
        self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: requests are the client's to log."""


def _stream_error(status: int, reply: dict[str, Any]) -> dict[str, Any]:
    return {"error": {**reply["error"], "code": status}}
