"""Several engines behind one `interfaces.DirectEngine`: each rank group of the trainer has its own.

Engine e has ranks 0 .. T-1 of its own and sits on the trainer ranks e*T .. e*T + T-1; outside of this file engine ranks
are counted through, as the trainer ranks are. Whatever is asked of the group is asked of all engines at the same time.
They serve the same weights or none of them serves: one that fails a step of an update makes all of them stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_sglang.buckets import Bucket
from megatron_sglang.engine import wire
from megatron_sglang.engine.background import side_by_side
from megatron_sglang.engine.beacon import Announced
from megatron_sglang.engine.controls import Controls, client_of
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.errors import ConfigError, MegatronSglangError, WeightSyncError, from_text
from megatron_sglang.layout import RankLayout
from megatron_sglang.types import Completion, GenerateRequest

if TYPE_CHECKING:
    from megatron_sglang.engine.client import Address, EngineClient
    from megatron_sglang.engine.router import Router
    from megatron_sglang.stops import Decode


def spread(options: EngineOptions, count: int) -> list[EngineOptions]:
    """Options of `count` engines like `options`, side by side on the GPUs, each with a log file of its own."""
    return [_options_of(engine, options) for engine in range(count)]


def _options_of(engine: int, options: EngineOptions) -> EngineOptions:
    """Options of engine number `engine`, made from the first one's."""
    if engine == 0:
        return options
    log_path, extra = options.log_path, dict(options.extra)
    if log_path is not None:
        path = Path(log_path)
        log_path = str(path.with_name(f"{path.stem}{engine}{path.suffix}"))
    if options.resolved_device() == "cuda":
        step = engine * options.tp_size * extra.get("gpu_id_step", 1)
        extra["base_gpu_id"] = extra.get("base_gpu_id", 0) + step
    return dataclasses.replace(options, log_path=log_path, extra=extra)


def blocks(requests: Sequence[GenerateRequest], count: int) -> list[Sequence[GenerateRequest]]:
    """`count` contiguous parts of about equal length. None of them cuts a run of equal prompts, the samples of a group:
    one engine computes their prompt once."""
    ends = [n for n in range(1, len(requests)) if requests[n].token_ids_T != requests[n - 1].token_ids_T]
    at = [0, *ends, len(requests)]
    cuts = [min(at, key=lambda n: abs(n * count - part * len(requests))) for part in range(count + 1)]
    return [requests[start:end] for start, end in itertools.pairwise(cuts)]


def _require_alike(options: Sequence[EngineOptions]) -> None:
    if len(sizes := {(one.tp_size, one.ep_size) for one in options}) != 1:
        raise ConfigError(
            f"a group of {len(options)} engines has (tp_size, ep_size) {sorted(sizes)}, expected one pair for "
            "all; engines that share a trainer must be alike"
        )


class EngineGroup(Announced):
    """One engine for each of `options`, which have the same sizes. Errors keep their class; their text names the
    engine."""

    router: Router | None = None
    """Set before `start`: requests of `client` go through it; it starts and ends with the engines."""

    def __init__(self, options: Sequence[EngineOptions]) -> None:
        _require_alike(options)
        self.engines = [HttpEngine(one) for one in options]
        for engine in self.engines[1:]:  # whoever may ask one may ask all; each has an admin key of its own
            engine.server.api_key = self.engines[0].server.api_key

    @classmethod
    def of(cls, engines: Sequence[HttpEngine]) -> Self:
        """A group of engines that exist already, such as external ones, whose sizes are known when they are
        connected."""
        group = cls([engine.options for engine in engines])
        group.engines = list(engines)
        return group

    @property
    def unproved(self) -> str:
        """See `external.ExternalEngine`."""
        return "; ".join(engine.unproved for engine in self.engines if engine.unproved)

    @property
    def _reason(self) -> str:
        """Why one of them must not serve; empty while all may."""
        return next((engine.stale for engine in self.engines if engine.stale), "")

    @property
    def _ranks_each(self) -> int:
        return self.engines[0].options.tp_size

    # ---- life ----

    def start(self) -> None:
        """Spawn all servers and return; if one cannot be spawned, none is left."""
        with self._all_or_none():
            for number, engine in enumerate(self.engines):
                with self._naming(number):
                    engine.start()

    def wait_ready(self, stale: str = "") -> None:
        """Block until all answer. If one does not come up, all are closed and the others not waited for. stale: see
        `HttpEngine.wait_ready`."""
        with self._all_or_none():
            self.each(lambda _, engine: engine.wait_ready(stale), until_first_error=True)
            _require_alike([engine.options for engine in self.engines])
            if self.router is not None:
                self.router.ensure()
        self.stale = self._reason

    def why_dead(self) -> str | None:
        """None while all run; else what is known of those that do not."""
        reasons = ((self._name(number), engine.why_dead()) for number, engine in enumerate(self.engines))
        router = [("router: ", self.router.why_dead())] if self.router is not None else []
        return "; ".join(f"{name}{reason}" for name, reason in (*reasons, *router) if reason) or None

    def restart(self) -> None:
        """Start those that died anew, and a router before them; none serves until the next update."""
        self.fail_update("an engine beside it died")
        for _ in self.engines:  # while one is started, another may turn out to be dead: a router would look for it
            dead = [engine for engine in self.engines if engine.why_dead()]
            if not dead:
                break
            self.each(lambda _, engine, dead=dead: engine.restart() if engine in dead else None, until_first_error=True)
        if self.router is not None:
            self.router.ensure()

    def close(self) -> None:
        """End every process of all engines, also if that fails for one of them; idempotent, safe at any point."""
        self._withdraw()
        try:
            if self.router is not None:
                self.router.close()
        finally:
            self.each(lambda _, engine: engine.close())

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- generation ----

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order. A request carries its own seed, so it does not matter who serves it."""
        parts = blocks(requests, len(self.engines))
        answers = self.each(lambda number, engine: engine.generate(parts[number]), until_first_error=True)
        return [completion for answer in answers for completion in answer]

    def warm_up(self, requests: Sequence[GenerateRequest]) -> None:
        """See `Controls.warm_up`; each engine gets its part of them."""
        parts = blocks(requests, len(self.engines))
        self.each(lambda number, engine: engine.warm_up(parts[number]), until_first_error=True)

    @property
    def addresses(self) -> list[Address]:
        """See `HttpEngine.addresses`."""
        return [address for engine in self.engines for address in engine.addresses]

    def client(self, decode: Decode | None = None, **more: Any) -> EngineClient:
        """For many requests at once; a session stays with one engine, anything else goes where least runs. With a
        `router` that chooses."""
        if self.router is not None:
            more = {"addresses": [self.router.ensure()], "why_dead": lambda _: self.why_dead(), **more}
        return client_of(self.engines, lambda: self.stale, decode, more)

    def on_each[T](self, ask: Callable[[Controls], T]) -> list[T]:
        """Ask all engines at the same time for what they do between updates: sleep, pause, adapters (`controls.py`)."""
        try:
            return self.each(lambda _, engine: ask(engine))
        finally:
            self.stale = self._reason or self.stale

    # ---- weights ----

    def begin_update(self, version: int, *, direct: bool = False) -> None:
        self.note_update(version)
        with self.as_one():
            self.each(lambda _, engine: engine.begin_update(version, direct=direct))

    def load(self, bucket: Bucket) -> None:
        with self.as_one():
            self.each(lambda _, engine: engine.load(bucket))

    def install_plan(self, receipts: Sequence[Mapping[str, Any]]) -> None:
        """receipts: by engine rank, counted through."""
        size = self._ranks_each
        with self.as_one():
            self.each(lambda number, engine: engine.install_plan(receipts[number * size : (number + 1) * size]))

    def open_stream(self, version: int) -> dict[str, Any]:
        """What `line.open_line` needs on every trainer rank."""
        with self.as_one():
            calls = self.each(lambda _, engine: engine.open_stream(version))
        named = [{**call, "engine": self._name(number)} for number, call in enumerate(calls)]
        return {"version": version, "ranks_each": self._ranks_each, "engines": named}

    def start_stream(self, call: Mapping[str, Any]) -> None:
        with self.as_one():
            self.each(lambda number, engine: engine.start_stream(call["engines"][number]))

    def end_stream(self, *, gave_up: bool) -> None:
        with self.as_one():
            self.each(lambda _, engine: engine.end_stream(gave_up=gave_up))

    def commit_update(self, version: int, buckets: int) -> str:
        """The digest is that of each engine: they hold the same weights in the same layout."""
        with self.as_one():
            digests = self.each(lambda _, engine: engine.commit_update(version, buckets))
        if len(set(digests)) > 1:
            found = ", ".join(f"engine {number} {digest}" for number, digest in enumerate(digests))
            reason = (
                f"weight version {version}, commit: engines of one trainer hold different weights, by their digests: "
                f"{found}; expected one digest; publish again, and restart the engines if that does not help"
            )
            self.fail_update(reason)
            raise WeightSyncError(reason)
        self.stale = self._reason  # they may be held back
        return digests[0]

    def hold_back(self, reason: str) -> None:
        for engine in self.engines:
            engine.hold_back(reason)

    def serve(self, version: int) -> None:
        with self.as_one():
            self.each(lambda _, engine: engine.serve(version))
        self.stale = self._reason

    def fail_update(self, reason: str) -> None:
        """See `HttpEngine.fail_update`. An engine that has committed already may not serve either."""
        self.stale = f"the last update failed: {reason}"
        for engine in self.engines:
            engine.fail_update(reason)

    def release(self) -> None:
        self.stale = "its memory is released"
        self.each(lambda _, engine: engine.release())

    def take_resume_s(self) -> float:
        """Seconds of the slowest engine, since all do it at the same time."""
        return max(engine.take_resume_s() for engine in self.engines)

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
        """See `HttpEngine`; by engine rank, counted through all engines."""
        with self.as_one():
            found = self.each(lambda _, engine: engine.layout(shapes))
        layouts = itertools.chain.from_iterable(found)
        return [dataclasses.replace(layout, rank=rank) for rank, layout in enumerate(layouts)]

    def self_test(self, weights: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `HttpEngine`; by engine rank, counted through all engines."""
        with self.as_one():
            return list(itertools.chain.from_iterable(self.each(lambda _, engine: engine.self_test(weights))))

    # ---- steps ----

    def each[T](self, ask: Callable[[int, HttpEngine], T], *, until_first_error: bool = False) -> list[T]:
        """Call `ask` with each engine and its number, all at the same time; what each gave. If some fail, the error of
        the first of them is raised, but one that is a mere consequence (`_was_cut`) only if there is no other."""

        def of(number: int) -> T:
            with self._naming(number):
                return ask(number, self.engines[number])

        works = [lambda number=number: of(number) for number in range(len(self.engines))]
        futures = side_by_side(works, until_first_error=until_first_error)
        errors = [error for future in futures if future.done() and (error := future.exception())]
        if errors:
            raise min(errors, key=_was_cut)
        return [future.result() for future in futures]

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """If a step fails and leaves one engine stale, make all stale. An error that leaves none so is a mistake of the
        caller, and changes nothing."""
        try:
            yield
        except MegatronSglangError as error:
            if any(engine.stale for engine in self.engines):
                self.fail_update(str(error))
            raise

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with contextlib.suppress(MegatronSglangError):  # the reason is the first error
                self.close()
            raise

    @contextlib.contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        try:
            yield
        except MegatronSglangError as error:
            raise from_text(type(error).__name__, f"{self._name(number)}{error}") from error

    def _name(self, number: int) -> str:
        return f"engine {number}: "


def _was_cut(error: BaseException) -> bool:
    """Did this engine fail only because its trainer left, which it did because of another error?"""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, wire.LineCutError):
        cause = cause.__cause__
    return cause is not None
