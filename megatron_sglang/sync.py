"""Two paths by which a weight version reaches the engine, behind one call: `publish`. Collective on all ranks.

    generic   full tensors under their HF names through the engine's own loader: any model, the oracle
    direct    only the rectangles that each engine rank needs, straight into its parameters, by a plan made once

`sync_plan.plan_for` makes the plan, or says why there is none. The direct path is used only after it has given the same
engine digest as the generic one for the same weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch

from megatron_sglang import transfer
from megatron_sglang.buckets import Bucket
from megatron_sglang.errors import MegatronSglangError, WeightSyncError
from megatron_sglang.interfaces import Comm, DirectEngine, Engine, Weights, leaders
from megatron_sglang.types import MergeFidelity, SyncReport


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent of one version: HF tensors, buckets, bytes."""

    tensors: int
    buckets: int
    bytes: int


class Path(Protocol):
    name: str

    def send(self, version: int) -> Sent:
        """Between `begin_update` and `commit_update`."""
        ...

    def fidelity(self) -> MergeFidelity:
        """See `interfaces.Weights`."""
        ...


class TakesBuckets(Protocol):
    def load(self, bucket: Bucket) -> None: ...


@runtime_checkable
class Prepares(Protocol):
    """A path that has something to do before the engine stops serving (`sync_methods.py`)."""

    def prepare(self, version: int) -> None:
        """While the engine still serves. Collective."""
        ...


@runtime_checkable
class OwnSteps(Protocol):
    """A path whose update is another transaction than `begin_update` and `commit_update` of a generic one."""

    def begin(self, version: int) -> None:
        """In place of `begin_update`; on the leader."""
        ...

    def commit(self, version: int, buckets: int) -> str:
        """In place of `commit_update`; on the leader."""
        ...


class GenericPath:
    """Full tensors in buckets, handed over by the leader."""

    name = "generic"

    def __init__(self, comm: Comm, weights: Weights, engine: TakesBuckets | None) -> None:
        self.comm, self.weights, self.engine = comm, weights, engine
        self.fidelity = weights.fidelity

    def send(self, version: int) -> Sent:
        tensors = count = size = 0
        for bucket in agreed(self.comm, self.weights.buckets(version)):
            self.comm.from_leader(lambda bucket=bucket: leaders(self.engine).load(bucket))
            tensors, count, size = tensors + len(bucket.specs), count + 1, size + bucket.data.numel()
        return Sent(tensors, count, size)


class BroadcastPath(GenericPath):
    """The same buckets through a process group of the leader and all engine ranks. engine: `engine/broadcast.py`."""

    name = "broadcast"


class Delivery(Protocol):
    """What one rank hands to an engine rank (`weights/direct.py`)."""

    @property
    def target(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def buffer(self) -> int: ...
    @property
    def memory(self) -> torch.Tensor: ...
    @property
    def data(self) -> torch.Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def digests(self) -> tuple[int, ...]: ...


class Sender(Protocol):
    """The trainer's side of the direct path (`weights/direct.py`)."""

    buckets: Sequence[Sequence[transfer.Piece]]
    dtype: torch.dtype
    rounds: Sequence[int]

    def deliveries(self, free: Callable[[int], None], failed: Callable[[], bool]) -> Iterator[Delivery]: ...

    def fidelity(self) -> MergeFidelity: ...


class Line(Protocol):
    """To one engine rank (`engine/line.py`)."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def send(self, header: Mapping[str, Any], buffer: int, memory: torch.Tensor, data: torch.Tensor) -> None: ...

    def wait(self, index: int) -> None: ...

    def finish(self) -> None: ...


class DirectPath:
    """Each trainer rank hands over what its engine ranks need, on a line to each of them (words: `transfer.py`).

    While an engine rank writes one delivery, the trainer merges the next. SGLang gets one message for all of a version:
    each engine rank then connects to its line, and after the last delivery answers with digests of its parameters.
    open_line: (what `open_stream` gave, engine rank) -> a line. hosts: how many trainer ranks, the first ones, have
    lines (`transfer.host_of`); None: all.
    """

    name = "direct"

    def __init__(
        self,
        comm: Comm,
        sender: Sender,
        engine: DirectEngine | None,
        engine_ranks: int,
        open_line: Callable[[Mapping[str, Any], int], Line],
        hosts: int | None = None,
    ) -> None:
        self.comm, self.sender, self.engine = comm, sender, engine
        self.engine_ranks, self.open_line = engine_ranks, open_line
        hosts = hosts or comm.world_size
        self._mine = [rank for rank in range(engine_ranks) if transfer.host_of(rank, hosts) == comm.rank]
        self.fidelity = sender.fidelity
        pieces = [piece for bucket in sender.buckets for piece in bucket]
        self._sent = Sent(
            tensors=len({piece.name for piece in pieces}),
            buckets=len(sender.buckets),
            bytes=sum(piece.size for piece in pieces) * sender.dtype.itemsize,
        )
        self.exchanges = len(sender.buckets) * len(sender.rounds)
        """All-to-alls of one version."""

    @property
    def plan(self) -> Sequence[Sequence[transfer.Piece]]:
        """The same object, of one `Plans`, while nothing has changed that it depends on."""
        return self.sender.buckets

    def begin(self, version: int) -> None:
        """On the leader, as `commit`: see `OwnSteps`."""
        leaders(self.engine).begin_update(version, direct=True)

    def commit(self, version: int, buckets: int) -> str:
        return leaders(self.engine).commit_update(version, buckets)

    def send(self, version: int) -> Sent:
        call = self.comm.from_leader(lambda: leaders(self.engine).open_stream(version))
        try:
            with contextlib.ExitStack() as stack:
                lines: dict[int, Line] = {}
                failure = None
                try:
                    for rank in self._mine:
                        lines[rank] = stack.enter_context(self.open_line(call, rank))
                except OSError as error:
                    failure = WeightSyncError(f"version {version}: cannot listen for the engine rank: {error}")
                self.comm.agree(failure)  # every rank listens before any engine rank connects
                self.comm.from_leader(lambda: leaders(self.engine).start_stream(call))
                self.comm.agree(self._hand_over(lines))
        except MegatronSglangError as error:
            # Every rank has this error, by `agree` or `from_leader`, so all of them can take the next step together. An
            # unforeseen error of one rank is not caught, since that rank would wait for the others here.
            self._end_stream(error)
            raise
        self._end_stream(None)
        return self._sent

    def _end_stream(self, seen: MegatronSglangError | None) -> None:
        """Collect the engine's verdict. seen: the error that the trainer has already. Where both failed the engine's
        reason comes first, since the trainer may only have seen the line break; but only the trainer knows at which
        delivery, if the engine died."""
        try:
            self.comm.from_leader(lambda: leaders(self.engine).end_stream(gave_up=seen is not None))
        except WeightSyncError as verdict:
            if seen is None:
                raise
            raise WeightSyncError(f"{verdict}; as the trainer saw it: {seen}") from seen
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.ipc_collect()  # every rank has lent memory; the engine has answered, and given it back

    def _hand_over(self, lines: Mapping[int, Line]) -> MegatronSglangError | None:
        """Send all deliveries; what went wrong on this rank. After an error its lines rest, but it still takes part in
        the all-to-alls, which would hang without it and tell all ranks, so that these stop after the same one."""
        dtype = str(self.sender.dtype).removeprefix("torch.")
        failures: list[MegatronSglangError] = []

        def unless_failed(work: Callable[[], None]) -> None:
            try:
                if not failures:
                    work()
            except MegatronSglangError as error:
                failures.append(error)

        def free(index: int) -> None:
            for line in lines.values():
                unless_failed(lambda line=line: line.wait(index))

        for delivery in self.sender.deliveries(free, lambda: bool(failures)):
            if (line := lines.get(delivery.target)) is not None:
                header = {"index": delivery.index, "lengths": delivery.lengths, "digests": delivery.digests}
                what = ({**header, "dtype": dtype}, delivery.buffer, delivery.memory, delivery.data)
                unless_failed(lambda line=line, what=what: line.send(*what))
        for line in lines.values():
            unless_failed(line.finish)
        return failures[0] if failures else None


def publish(comm: Comm, engine: Engine | None, path: Path, version: int) -> SyncReport:
    """Give the engine weight version `version`, whole, or raise `WeightSyncError` on all ranks and leave it stale."""
    own = path if isinstance(path, OwnSteps) else None
    began = time.perf_counter()
    if isinstance(path, Prepares):
        with _whole_or_stale(engine, version):
            path.prepare(version)
    prepared = time.perf_counter()
    comm.from_leader(lambda: own.begin(version) if own is not None else leaders(engine).begin_update(version))
    opened = time.perf_counter()
    with _whole_or_stale(engine, version):
        sent = path.send(version)
        loaded = time.perf_counter()
        commit = own.commit if own is not None else lambda *what: leaders(engine).commit_update(*what)
        digest = comm.from_leader(lambda: commit(version, sent.buckets))
    seconds = {"begin": opened - prepared, "load": loaded - opened, "verify": time.perf_counter() - loaded}
    if isinstance(path, Prepares):
        seconds["prepare"] = prepared - began
    return SyncReport(version, sent.tensors, sent.buckets, sent.bytes, seconds, path.fidelity(), digest)


@contextlib.contextmanager
def _whole_or_stale(engine: Engine | None, version: int) -> Iterator[None]:
    """Whatever goes wrong inside fails the update, even if the engine itself has not noticed."""
    try:
        yield
    except MegatronSglangError as error:
        if engine is not None:
            engine.fail_update(str(error))
        raise WeightSyncError(f"version {version} was not published: {error}") from error


WITNESS_GAP = {torch.float32: 0.05, torch.bfloat16: 0.5}
"""Largest believable mean |trainer's logprob - engine's logprob| of tokens just sampled. Measured: 2e-7 (fp32 on a CPU)
and 1e-4 (fp32 with TF32 products). Meant to catch an engine that computes another function of the same weights; that it
has these weights, not those of the last step, is what the digests prove."""


def require_agreement(gap: float, dtype: torch.dtype) -> None:
    """Raise `WeightSyncError` if trainer and engine compute different functions. gap: the mean difference of their
    logprobs of tokens that the engine has just sampled."""
    if gap > WITNESS_GAP[dtype]:
        raise WeightSyncError(
            f"the engine's logprobs of its own tokens differ from the trainer's by {gap:.3g} on average, expected at "
            f"most {WITNESS_GAP[dtype]:g} in {dtype}: it does not compute what the trainer does, though every weight "
            "was delivered; compare both models' config.json, and run one batch with sync.method=generic"
        )


def agreed[T](comm: Comm, items: Iterator[T]) -> Iterator[T]:
    """The same items, but an error that one rank meets on the way is raised on all of them."""
    while True:
        item, failure = None, None
        with contextlib.suppress(StopIteration):
            try:
                item = next(items)
            except MegatronSglangError as error:
                failure = error
        comm.agree(failure)
        if item is None:
            return
        yield item
