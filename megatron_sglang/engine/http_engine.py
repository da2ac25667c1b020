"""The `Engine` protocol over HTTP: what the cycle calls, turned into SGLang's routes in an order that is safe.

    call           messages (docs/engine.md has the whole table)
    begin_update   pause(abort), flush until 200, resume(weights) if released, loader "begin" (direct path: no message
                   to the loader yet)
    load           loader "load"
    start_stream   direct path: loader "stream", in the background until end_stream
    commit_update  loader "commit" (direct path: no message, "stream" has answered the same), weight version,
                   resume(kv_cache) if released, continue
    release        pause(abort), flush until 200, release(kv_cache, weights)
    wait_ready     with load_format="auto": loader "adopt", weight version 0
    layout         loader "layout"; while it serves pause(abort) and flush before it, continue after it
    install_plan   loader "plan", likewise
    self_test      pause(abort), flush until 200, loader "self_test"

SGLang kills itself when an update flushes, or memory is released, while a request is alive: hence pause and flush
first, and never a flush inside an update. Requests that change state are never sent twice.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.engine import line, wire
from megatron_sglang.engine.background import Background
from megatron_sglang.engine.controls import Controls
from megatron_sglang.engine.http import Http
from megatron_sglang.engine.options import LOADER, EngineOptions
from megatron_sglang.engine.server import Server
from megatron_sglang.errors import EngineError, WeightSyncError
from megatron_sglang.layout import RankLayout


class HttpEngine(Controls):
    """One rollout engine, SGLang or the fake; see `interfaces.Engine`. Raises `EngineError` and `WeightSyncError`."""

    unproved = ""
    """What is not proved of its weights, for people to read; empty where all is, as always here (see `external.py`)."""
    held_back = ""
    """Why a version is not served when it is committed, but by `serve` only; empty: it is. Until an update fails."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.server = Server(options)
        self.version: int | None = None
        """Published weight version, None before the first."""
        self._http: Http | None = None
        self.stale = "no weights were published yet"
        self.updating: int | None = None
        self.released: set[str] = set()
        self.unloaded: set[str] = set()
        self._message_ids = itertools.count(secrets.randbits(32))
        """Not from 0: the mailbox of an external engine may still hold answers to a trainer that has ended."""
        self._stream: Background[list[dict[str, Any]]] | None = None
        self._streamed: list[dict[str, Any]] | None = None
        """Of a direct update: the engine ranks' answers to "stream", empty until it has ended well. None: the open
        update is not a direct one."""

    # ---- life ----

    def start(self) -> None:
        """Spawn the server and return; build the trainer's model meanwhile."""
        self.server.start()

    def wait_ready(self, stale: str = "") -> None:
        """Block until the server answers; `EngineStartError` with its last log lines otherwise. stale: why weights that
        SGLang has loaded itself must not be served; empty: they are, as version 0."""
        self.server.wait_ready()
        self._http = Http(self.server.port, self.server.api_key, self.server.admin_key, self.server.why_dead)
        if self.options.load_format == "auto":
            self.tell("weights from disk", {"command": "adopt"})
            self.publish(0, stale)

    def why_dead(self) -> str | None:
        """None while its processes run; else its last log lines."""
        return self.server.why_dead()

    def restart(self) -> None:
        """End what is left of the engine and start it anew; stale until the next update."""
        self._end()
        self.stale, self.updating, self.version = "it was started again", None, None
        self.released.clear()
        self.unloaded.clear()
        self.start()
        self.wait_ready(self.stale)  # also where SGLang has loaded weights: they are of another version

    def close(self) -> None:
        """End every process of the engine; idempotent, safe at any point."""
        self._withdraw()
        self._end()

    def _end(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None
        self.server.close()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- weights ----

    def begin_update(self, version: int, *, command: str = "begin", direct: bool = False) -> None:
        """Abort running requests, empty the caches and open `version` on every engine rank; stale from here on.

        command: the loader's that opens it. direct: the direct path follows, and `start_stream` will open it.
        """
        self.note_update(version)
        self.updating, self._streamed = None, [] if direct else None
        with self.failing_as(what := f"weight version {version}, begin"):
            self.quiesce()
            self._take_weights_back()
            if not direct:
                self.tell(what, {"command": command, "version": version})
        self.updating = version

    def load(self, bucket: Bucket) -> None:
        """Hand one bucket to every engine rank; its buffer may be reused when this returns."""
        with self.failing_as(what := self.in_update(bucket.version, f"bucket {bucket.index}")):
            message = {"command": "load", "version": bucket.version, "bucket": bucket.header()}
            self.tell(what, message, bucket.data)
        wire.collect_ipc()

    def install_plan(self, receipts: Sequence[Mapping[str, Any]]) -> None:
        """Direct path: tell each engine rank what it will write: by rank, {"buckets", "constants"} of `direct.Plan`. An
        engine that serves goes on to, as after `layout`."""
        with self.failing_as("transfer plan"), self._requests_ended():
            self.tell("transfer plan", {"command": "plan"}, each=receipts)

    def open_stream(self, version: int) -> dict[str, Any]:
        """Direct path: the `call` of this version, JSON values with which every trainer rank listens for the engine
        rank beside it (`line.Line`). No message to the engine yet."""
        self.in_update(version, "stream")
        folder, timeout_s = str(self.server.mailbox), self.options.update_timeout_s
        return {"id": next(self._message_ids), "version": version, "folder": folder, "timeout_s": timeout_s}

    def start_stream(self, call: Mapping[str, Any]) -> None:
        """Direct path, when all trainer ranks listen: open the version in the engine ranks and let them connect.
        `end_stream` must follow."""
        what = self.in_update(call["version"], "stream")
        payloads = wire.serialize_alike({**call, "command": "stream"}, self.options.tp_size)
        over = self.server.mailbox / line.ended_name(call["id"])
        self._stream = Background(lambda: self._send(what, call["id"], payloads), over)

    def end_stream(self, *, gave_up: bool) -> None:
        """Direct path: wait for the engine ranks' verdict on what they were sent, and keep it for `commit_update`.

        gave_up: the trainer has left its lines after an error of its own. Then engine ranks that only say that the line
        was cut are no news, other errors are raised, and nothing is kept.
        """
        stream, self._stream = self._stream, None
        expected = (wire.LineCutError,) if gave_up else ()
        with self.failing_as("stream"), contextlib.suppress(*expected):
            if stream is not None:
                answers = stream.result(self.options.update_timeout_s)
                self._streamed = [] if gave_up else answers

    def commit_update(self, version: int, buckets: int) -> str:
        """Let every rank prove that it holds `version` whole, then serve it, unless it is `held_back`. Returns the
        digest of all parameters of all ranks. buckets: how many were sent; on the direct path, deliveries to each rank.
        """
        with self.failing_as(what := self.in_update(version, "commit")):
            if self._streamed is None:
                replies = self.tell(what, {"command": "commit", "version": version, "buckets": buckets})
            else:
                replies = _of_stream(self._streamed, buckets, what)
            self.wake_up()
            if self.held_back:
                self.updating, self.stale = None, self.held_back
            else:
                self.publish(version)
        return wire.engine_digest(replies)

    def hold_back(self, reason: str) -> None:
        """Versions are committed, but not served until `serve`."""
        self.held_back = reason

    def serve(self, version: int) -> None:
        """Serve `version`, which was committed and held back."""
        self.held_back = ""
        with self.failing_as(f"weight version {version}, serve"):
            self.publish(version)

    def fail_update(self, reason: str) -> None:
        """Give up the open update: the engine stays paused and stale until another one succeeds."""
        self.updating, self.held_back = None, ""
        self.stale = f"the last update failed: {reason}"

    # ---- layout ----

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
        """Where each engine rank's parameters come from, by rank. shapes: of all HF tensors to be sent.

        Weights stay as they are, and an engine that serves goes on to; but its requests are aborted, since SGLang would
        take the message only when the last of them has ended. Weights that were released have their memory back, as an
        update would give it. `WeightSyncError`, and a stale engine, where the model's loader cannot be traced; see
        `megatron_sglang.layout.problems` for what the result may lack.
        """
        message = {"command": "layout", "dtype": self.options.dtype, "shapes": dict(shapes)}
        with self.failing_as("layout"), self._requests_ended():
            self._take_weights_back()
            replies = self.tell("layout", message)
        return [RankLayout.from_json(reply["layout"]) for reply in replies]

    def self_test(self, weights: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Prove that the layout says what the loader does: `weights`, all HF tensors or some, are loaded both ways in
        every rank and must give the same bits; `WeightSyncError` if they do not. Returns the reports by rank. The
        engine is stale afterwards."""
        bucket = pack(0, 0, list(weights.items()))
        with self.failing_as("self-test"):
            self.quiesce()
            self._take_weights_back()
            replies = self.tell("self-test", {"command": "self_test", "bucket": bucket.header()}, bucket.data)
        self.fail_update("a self-test has overwritten the weights")
        wire.collect_ipc()
        return [reply["report"] for reply in replies]

    # ---- steps, also for `method_calls.py` and `broadcast.py` ----

    def publish(self, version: int, stale: str = "") -> None:
        """Give the engine its version number and let it serve. stale: why nobody may use it yet, which readers of the
        beacon would do in the moment between two changes."""
        timeout = self.options.update_timeout_s
        body = {"new_version": str(version), "abort_all_requests": False}
        self.connected.post("/update_weight_version", body, timeout)
        self.connected.post("/continue_generation", {}, timeout)
        self.version, self.updating, self.stale = version, None, stale

    def tell(
        self,
        what: str,
        message: dict[str, Any],
        data: torch.Tensor | None = None,
        each: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Send one message to every rank's loader; their answers, by rank. what: names the step in errors. each: more
        of the message, by rank."""
        identity = next(self._message_ids)
        if data is not None and self.options.resolved_device() == "cpu":
            data = data.cpu()  # the engine could not open a handle
        payloads = wire.serialize_alike({"id": identity, **message}, self.options.tp_size, data, each)
        return self._send(what, identity, payloads)

    def _send(self, what: str, identity: int, payloads: list[str]) -> list[dict[str, Any]]:
        """By SGLang's route for weights, whose own answer says nothing; the loader's answers are in the mailbox."""
        body = {
            "serialized_named_tensors": payloads,
            "load_format": LOADER,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        self.connected.post("/update_weights_from_tensor", body, self.options.update_timeout_s)
        return wire.collect(self.server.mailbox, identity, len(payloads), what)

    def in_update(self, version: int, step: str) -> str:
        """Name of a step of the open update, which must be of `version`."""
        what = f"weight version {version}, {step}"
        if version != self.updating:
            open_update = "no update is open" if self.updating is None else f"version {self.updating} is open"
            raise WeightSyncError(f"{what}: {open_update}; call begin_update({version}) first")
        return what

    @contextlib.contextmanager
    def failing_as(self, what: str) -> Iterator[None]:
        """Turn whatever goes wrong into a failed update and a `WeightSyncError` that names the step."""
        try:
            yield
        except (EngineError, WeightSyncError) as error:
            reason = str(error) if isinstance(error, WeightSyncError) else f"{what}: {type(error).__name__}: {error}"
            self.fail_update(reason)
            raise WeightSyncError(reason) from error


def _of_stream(replies: list[dict[str, Any]], buckets: int, what: str) -> list[dict[str, Any]]:
    """The answers of all engine ranks, if each has taken as many deliveries as the trainer has made."""
    if not replies:
        raise WeightSyncError(f"{what}: no stream of this version has ended well; expected one of {buckets} deliveries")
    for rank, reply in enumerate(replies):
        if reply["deliveries"] != buckets:
            raise WeightSyncError(
                f"{what}, engine rank {rank}: it took {reply['deliveries']} deliveries, the trainer made {buckets}; "
                "make the plan anew"
            )
    return replies
