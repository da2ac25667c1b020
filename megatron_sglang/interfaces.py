"""What `cycle.py` and `sync.py` know of the rooms: Protocols, no implementation; and `leaders`, for what rank 0 has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_sglang.buckets import Bucket
from megatron_sglang.layout import RankLayout
from megatron_sglang.types import Completion, GenerateRequest, MergeFidelity, Prompt, Score


class Reward(Protocol):
    """Scores finished rollouts. Never raises for a bad answer; raises `RewardError` when it is itself broken."""

    @property
    def tier(self) -> str:
        """Where sampled code runs, for people to read."""
        ...

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """A rollout engine, seen from the rank that leads it. Every call has a deadline and raises `EngineError`.

    A weight update is a transaction: `begin_update` (no request runs any more, caches are empty), `load` for each
    bucket in order, `commit_update` (every engine rank has proved what it holds), or `fail_update` at any point.
    Between `begin_update` and a successful `commit_update` the engine is stale and `generate` refuses.
    """

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]: ...

    def begin_update(self, version: int) -> None: ...

    def load(self, bucket: Bucket) -> None: ...

    def commit_update(self, version: int, buckets: int) -> str:
        """Check that every engine rank got `buckets` buckets and filled every parameter; the engine's digest."""
        ...

    def hold_back(self, reason: str) -> None:
        """Updates are committed, but not served until `serve`, or until one has failed."""
        ...

    def serve(self, version: int) -> None:
        """Serve `version`, which was committed last and held back."""
        ...

    def fail_update(self, reason: str) -> None: ...

    def release(self) -> None:
        """Give back the memory of weights and caches; the next update brings them back."""
        ...

    def take_resume_s(self) -> float:
        """Seconds in which updates took it back, since the last call."""
        ...

    def why_dead(self) -> str | None:
        """None while it runs; else what is known of its end."""
        ...

    def restart(self) -> None:
        """End what is left of a dead engine and start it anew, without weights."""
        ...

    def close(self) -> None: ...


class AsyncEngine(Protocol):
    """The same engine for many requests at once, each of which waits for its own completion; of one event loop.

    Every call has a deadline and raises `EngineError`, or `EngineStaleError` where the engine must not serve.
    """

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Aborted, it is what was sampled until then, with finish_reason "abort"."""
        ...

    async def abort(self) -> None:
        """End every request of this client that still runs."""
        ...


class DirectEngine(Engine, Protocol):
    """An engine whose parameters can be written directly, by a plan.

    Then an update is `begin_update(version, direct=True)`, `open_stream`, `start_stream`, `end_stream` and
    `commit_update`.
    """

    def begin_update(self, version: int, *, direct: bool = False) -> None:
        """direct: the engine ranks hear of it by `start_stream`, which opens the version in them."""
        ...

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
        """Where each engine rank's parameters come from; shapes: of all HF tensors."""
        ...

    def self_test(self, weights: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Load these HF tensors by the engine's loader and as its layout says; `WeightSyncError` where bits differ. The
        engine is stale afterwards."""
        ...

    def install_plan(self, receipts: Sequence[Mapping[str, Any]]) -> None:
        """By engine rank, what it will write in every delivery to come."""
        ...

    def open_stream(self, version: int) -> dict[str, Any]:
        """What every trainer rank needs to listen for the engine rank beside it; JSON values."""
        ...

    def start_stream(self, call: Mapping[str, Any]) -> None:
        """Let the engine ranks connect to the trainer ranks, which listen, and take what they send."""
        ...

    def end_stream(self, *, gave_up: bool) -> None:
        """After the last delivery, or when a trainer rank gave up: raises what an engine rank found wrong. What they
        have proved is kept for `commit_update`."""
        ...


class Weights(Protocol):
    """The trainer's merged weights, HF names. Collective: every rank iterates, every rank gets every bucket."""

    def buckets(self, version: int) -> Iterator[Bucket]: ...

    def fidelity(self) -> MergeFidelity:
        """What merging changed in the last version, over all ranks. Collective."""
        ...


class Comm(Protocol):
    """How ranks act as one."""

    rank: int
    world_size: int

    def from_leader(self, produce: Callable[[], Any]) -> Any:
        """Run `produce` on rank 0 and give its JSON-able value to all; its error is raised on all ranks."""
        ...

    def bytes_from_leader(self, parts: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
        """Rank 0's `parts`, whose sizes every rank knows, on every rank."""
        ...

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error (the lowest such rank's, named)."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank, on every rank."""
        ...


def leaders[T](value: T | None) -> T:
    """`value`, which rank 0 alone has: the engine, and what is prepared for it."""
    assert value is not None, "only the leader talks to the engine, and only what was prepared can be sent"
    return value
