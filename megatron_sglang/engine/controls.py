"""What an engine does between weight updates: it serves, sleeps, pauses. One half of `HttpEngine`; the other one, from
`begin_update` to `commit_update`, is `http_engine.py`.

    call                 running requests                        afterwards
    generate, client     their own                               -
    pause(mode)          abort: end, with what they have         requests wait in the engine
                         retract, in_place: stop where they are
    resume               go on                                   serving; refused while the engine is stale
    abort_requests       end, with what they have                serving
    reset_prefix_cache   are waited for                          serving, without cached prefixes
    sleep                end; or get `drain_s` to finish first   stale, memory free
    wake_up, release     (there are none)                        stale until the next update is committed
    load_adapter,        go on; unload waits for those of the    serving
    unload_adapter       adapter
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_sglang.engine import answers
from megatron_sglang.engine.beacon import Announced
from megatron_sglang.engine.http import Deadline, Http, was_sent
from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.engine.server import Server
from megatron_sglang.errors import ConfigError, DataError, EngineError, EngineStaleError, EngineTimeoutError
from megatron_sglang.types import Completion, GenerateRequest

if TYPE_CHECKING:
    from megatron_sglang.engine.client import Address, EngineClient
    from megatron_sglang.stops import Decode

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
"""What an engine's memory holds, in the order in which it is released. Of CUDA graphs SGLang 0.5.17 gives back what was
captured with SGLANG_MEMORY_SAVER_CUDA_GRAPH=1 in its environment, else nothing."""

FLUSH_S = 10.0
"""The longest that one /flush_cache asks SGLang to wait for running requests."""
ANSWER_S = 1.0
"""How much longer than that we wait for its answer, at most."""
LAST_S = 0.2
"""With less time left than this a refused flush is not tried again: the answer would hardly come in time."""

PauseMode = Literal["abort", "retract", "in_place"]


class Controls(Announced):
    """See `HttpEngine`. Every call has a deadline, `update_timeout_s` unless it is given one, and raises
    `EngineError`."""

    options: EngineOptions
    server: Server
    version: int | None
    adapter: str = ""
    """Name of the adapter that serves requests which name none; empty: the weights as they are."""
    unloaded: set[str]
    """Names of adapters that were unloaded. SGLang does not refuse them: it remembers the folder and loads it again."""
    _http: Http | None
    updating: int | None
    """Version of the open update."""
    released: set[str]
    """Tags of memory that the engine has given back (`_memory_tags`)."""
    _resume_s: float = 0.0

    # ---- generation ----

    @property
    def addresses(self) -> list[Address]:
        """Where it serves, with its keys: do not print or pass on."""
        from megatron_sglang.engine.client import Address

        server = self.server
        return [Address(f"http://127.0.0.1:{server.port}", server.api_key, server.admin_key)]

    def client(self, decode: Decode | None = None, **more: Any) -> EngineClient:
        """A client for many requests at once, in an event loop; it refuses while the engine is stale. more: further
        arguments of `EngineClient`."""
        return client_of([self], lambda: self.stale, decode, more)

    def on_each[T](self, ask: Callable[[Controls], T]) -> list[T]:
        """What `ask` gives for each engine: for this one. A group asks several at the same time."""
        return [ask(self)]

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order; all go out in one HTTP call, so that they are batched alike each time.

        Besides `stop_token_ids`, the model's own eos tokens stop a completion. Logprobs are those of the
        temperature-scaled distribution before top_p and top_k. An update elsewhere ends requests with "abort".
        """
        self._require_proved()
        if not requests:
            return []
        version = self.version
        for request in requests:
            require_loaded(request.adapter or self.adapter, self.unloaded)
        if self.adapter:
            requests = [one if one.adapter else dataclasses.replace(one, adapter=self.adapter) for one in requests]
        replies = self._ask(requests)
        return [_completion(one, reply, version) for one, reply in zip(requests, replies, strict=True)]

    def warm_up(self, requests: Sequence[GenerateRequest]) -> None:
        """Have `requests` answered, whatever the weights are, so that the engine compiles the kernels they need. The
        answers are nobody's, and the next update forgets the prefixes that were cached."""
        if requests:  # of a group, one engine may have none; SGLang refuses a message without any
            self._ask(requests)

    def _ask(self, requests: Sequence[GenerateRequest]) -> list[dict[str, Any]]:
        """SGLang's answers to all of them, in order."""
        if any(request.sampling.stop or request.sampling.min_new_tokens for request in requests):
            raise ConfigError(
                "requests in one call know neither stop texts nor min_new_tokens, which need to be watched one by one; "
                "use client(decode).generate"
            )
        body = answers.batch_body(requests)
        replies = self.connected.post("/generate", body, self.options.request_timeout_s, admin=False)
        if not isinstance(replies, list) or len(replies) != len(requests):
            raise EngineError(f"engine answered {len(requests)} requests with {str(replies)[:200]}, not a list of them")
        return replies

    def info(self) -> dict[str, Any]:
        """SGLang's /server_info: resolved arguments, sizes, version."""
        return self.connected.get("/server_info", self.options.update_timeout_s).json()

    def pause(self, mode: PauseMode = "abort") -> None:
        """No request runs until `resume`; new ones wait. abort: running ones end. retract: they give up their cache and
        are computed again. in_place: they keep it."""
        self.connected.post("/pause_generation", {"mode": mode}, self.options.update_timeout_s)

    def resume(self) -> None:
        """After `pause`. Refused while the engine is stale: what waits in it would be served by unproved weights."""
        self._require_proved()
        self.connected.post("/continue_generation", {}, self.options.update_timeout_s)

    def abort_requests(self) -> None:
        """End all requests in the engine, whoever sent them; each answers with what it has."""
        body = {"rid": "", "abort_all": True}
        self.connected.post("/abort_request", body, self.options.update_timeout_s)

    # ---- memory ----

    def reset_prefix_cache(self, timeout_s: float | None = None) -> None:
        """Forget all cached prefixes, when the requests that run have ended: SGLang refuses before."""
        self._flush(Deadline(timeout_s or self.options.update_timeout_s))

    def sleep(
        self,
        tags: Iterable[str] | None = None,
        *,
        timeout_s: float | None = None,
        abort_first: bool = True,
        drain_s: float = 5.0,
    ) -> None:
        """Give back the memory of `tags` (`MEMORY_TAGS`; None: all); stale until the next update is committed.

        Running requests are aborted, without abort_first only those that do not end within `drain_s` seconds.
        Tags that are released already are left alone. `EngineTimeoutError` when it takes longer than `timeout_s`, which
        begin when draining has ended.
        """
        wanted = _memory_tags(tags)
        timeout_s = timeout_s or self.options.update_timeout_s
        self.stale = "it sleeps"
        self.updating = None
        if not abort_first:
            self._drain(drain_s, timeout_s)
        deadline = Deadline(timeout_s)
        self.quiesce(deadline)
        if held := [tag for tag in wanted if tag not in self.released]:
            self._memory("release", *held, timeout_s=deadline.left("/release_memory_occupation"))

    def wake_up(self, tags: Iterable[str] | None = None, *, timeout_s: float | None = None) -> None:
        """Take back the memory of `tags` that is released. It holds nothing yet: the engine stays stale until the next
        update is committed. (An update takes the memory back by itself, too.)"""
        if released := [tag for tag in reversed(_memory_tags(tags)) if tag in self.released]:
            self._memory("resume", *released, timeout_s=timeout_s)

    def take_resume_s(self) -> float:
        """Seconds that taking memory back has cost since the last call. They are part of the updates' own seconds."""
        taken, self._resume_s = self._resume_s, 0.0
        return taken

    def release(self) -> None:
        """Give back the memory of weights and KV cache (on a CPU nothing is freed); stale until the next update."""
        self.sleep()
        self.stale = "its memory is released"

    # ---- adapters ----

    def load_adapter(self, name: str, path: str | Path, *, pinned: bool = False) -> None:
        """Load a PEFT folder as adapter `name`; requests name it as `GenerateRequest.adapter`. pinned: never evicted.
        `EngineError` where the engine was not started for adapters, or cannot use this one."""
        body = {"lora_name": name, "lora_path": str(path), "pinned": pinned}
        self.connected.post("/load_lora_adapter", body, self.options.update_timeout_s)
        self.unloaded.discard(name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter when its requests have ended; new ones that name it are refused at once, by `generate` and
        by clients of this process."""
        self.unloaded.add(name)
        self.connected.post("/unload_lora_adapter", {"lora_name": name}, self.options.update_timeout_s)

    # ---- steps ----

    def _require_proved(self) -> None:
        if self.stale:
            raise EngineStaleError(f"engine must not serve: {self.stale}; publish a weight version first")

    @property
    def connected(self) -> Http:
        if self._http is None:
            raise EngineError("engine is not connected; call start() and wait_ready() first")
        return self._http

    def quiesce(self, deadline: Deadline | None = None) -> None:
        """End all requests, forget all cached prefixes, and let none start until continue_generation."""
        deadline = deadline or Deadline(self.options.update_timeout_s)
        path = "/pause_generation"
        self.connected.post(path, {"mode": "abort"}, deadline.left(path))
        self._flush(deadline)

    @contextlib.contextmanager
    def _requests_ended(self) -> Iterator[None]:
        """Around a message that leaves the weights as they are, to an engine that may serve; it goes on to."""
        if not self.stale:
            self.quiesce()
        yield
        if not self.stale:
            self.resume()

    def _drain(self, seconds: float, answer_s: float) -> None:
        """Wait until no request is alive, or the time is over. By flushing, which an engine that will sleep can
        spare."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and self._try_flush(left, left + answer_s).status_code != 200:
            time.sleep(0.05)

    def _flush(self, deadline: Deadline) -> None:
        while True:
            left = deadline.left("/flush_cache")
            response = self._try_flush(left - min(ANSWER_S, left / 2), left)
            if response.status_code == 200:
                return
            if deadline.is_over(in_s=LAST_S):
                raise EngineTimeoutError(
                    f"engine refused for {deadline.seconds:g} s to flush its caches ({response.status_code}: "
                    f"{response.text[:200]}); a request may be stuck: restart the engine"
                )
            time.sleep(0.05)

    def _try_flush(self, wait_s: float, timeout_s: float) -> Any:
        """Ask SGLang once. wait_s: so long it waits itself for the requests to end. That must be less than timeout_s:
        if we gave up first we would learn nothing, and leave SGLang waiting."""
        return self.connected.get("/flush_cache", timeout_s, admin=True, timeout=min(FLUSH_S, wait_s))

    def _memory(self, action: Literal["release", "resume"], *tags: str, timeout_s: float | None = None) -> None:
        """Give back or take back the memory of `tags`, and note which tags are released now."""
        timeout_s = timeout_s or self.options.update_timeout_s
        began = time.perf_counter()
        note = self.released.update if action == "release" else self.released.difference_update
        try:
            self.connected.post(f"/{action}_memory_occupation", {"tags": list(tags)}, timeout_s)
        except EngineTimeoutError as error:
            # SGLang works off in order what it was sent, so what we send next will find it done. It must be noted now,
            # because SGLang ends if it is told the same twice.
            if was_sent(error):
                note(tags)
            raise
        if action == "resume":
            self._resume_s += time.perf_counter() - began
        note(tags)

    def _take_weights_back(self) -> None:
        """Take the weights' memory back if it was released. Its content is not the weights."""
        if "weights" in self.released:
            self._memory("resume", "weights")


def client_of(
    engines: Sequence[Controls], refuse: Callable[[], str], decode: Decode | None, more: dict[str, Any]
) -> EngineClient:
    """A client of engines that are alike, which finds them again when they are restarted. more: arguments of
    `EngineClient` that win over those from the engines."""
    from megatron_sglang.engine.client import EngineClient

    options = engines[0].options

    def why_dead(address: Address) -> str | None:
        # One that is not there any more was restarted, and is another engine.
        return next((one.server.why_dead() for one in engines if address in one.addresses), "it was started again")

    known: dict[str, Any] = {
        "addresses": lambda: [address for one in engines for address in one.addresses],
        "timeout_s": options.request_timeout_s,
        "refuse": refuse,
        "why_dead": why_dead,
        "eos_token_ids": eos_token_ids(options.model_path),
        "adapter": lambda: engines[0].adapter,
        "version": lambda: engines[0].version,
        "unloaded": lambda: set().union(*(one.unloaded for one in engines)),
    }
    return EngineClient(decode=decode, **(known | more))


def require_loaded(adapter: str, unloaded: Collection[str]) -> None:
    """`EngineError` for one that was unloaded."""
    if adapter in unloaded:
        raise EngineError(
            f"adapter {adapter!r} was unloaded, and a request names it; load it again, or name another one"
        )


def eos_token_ids(model_path: str) -> tuple[int, ...]:
    """The tokens that end a completion whatever a request says: those of config.json and generation_config.json, as
    SGLang takes them (configs/model_config.py, _get_hf_eos_token_id). Empty for a folder without these files."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(model_path, name)
        if path.exists():
            try:
                ids = json.loads(path.read_text()).get("eos_token_id")
            except ValueError as error:
                raise DataError(f"{path} is not JSON ({error}); expected a Hugging Face model's {name}") from error
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(sorted(found))


def _memory_tags(tags: Iterable[str] | None) -> list[str]:
    """The tags that are meant (None: all), in the order of release."""
    wanted = set(MEMORY_TAGS if tags is None else tags)
    if unknown := sorted(wanted - set(MEMORY_TAGS)):
        raise ConfigError(f"memory tags {unknown} do not exist; expected some of {', '.join(MEMORY_TAGS)}")
    return [tag for tag in MEMORY_TAGS if tag in wanted]


def _completion(request: GenerateRequest, reply: dict[str, Any], version: int | None) -> Completion:
    answer = answers.read(reply, 0, request.routing_from)
    if answer.finish_reason is None:
        raise EngineError("engine answered a request that has not ended; expected a finish_reason")
    if answer.weight_version != version:
        raise EngineError(
            f"engine generated with weight version {answer.weight_version}, expected the published {version}"
        )
    return Completion(
        answer.token_ids_T,
        answer.logprobs_T,
        answer.finish_reason,
        answer.weight_version,
        top_logprobs_T=answer.top_logprobs_T,
        routed_experts=answer.routed_experts,
    )
