"""Trainer and engine on the same device in turns. `SharedCycle` is `Cycle` with the turns of shared mode in it:

    training   the trainer's memory is here, the engine's is released
    publish    every rank merges and gathers; the leader keeps the buckets on the host (`StagedPath.stage`)
               trainer out, on all ranks; then the engine's memory comes back, and the buckets go into it, as ever
    rollout    the engine serves; the trainer's memory is empty
    collect    samples are there: the engine's memory is released; then the trainer's comes back, on all ranks

So neither model is there while the other needs the room; what both need at the same time is one bucket. The host holds
the merged weights once, on the leader, and each rank's own memory.

`ReleasingCycle` is half of it, for colocated mode: only the engine's memory goes and comes, and weights travel by any
path that sends all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_sglang.buckets import Bucket
from megatron_sglang.cycle import Cycle
from megatron_sglang.errors import MegatronSglangError, WeightSyncError
from megatron_sglang.interfaces import Comm, Engine, Weights
from megatron_sglang.sync import Sent, agreed
from megatron_sglang.training.offload import Offload
from megatron_sglang.training.plugin import Plugin
from megatron_sglang.types import SyncReport, TrainSample


class StagedPath:
    """The generic path in two halves: `stage` while the trainer's weights are there, `send` when they are gone."""

    name = "staged"

    def __init__(self, comm: Comm, weights: Weights, engine: Engine | None) -> None:
        self.comm, self.weights, self.engine = comm, weights, engine
        self.fidelity = weights.fidelity
        self._version: int | None = None
        self._buckets: Sequence[Bucket] = ()
        self._sent = Sent(0, 0, 0)

    def stage(self, version: int) -> None:
        """Collective. Replaces what was staged before."""
        self._version, self._buckets = None, ()
        kept: list[Bucket] = []
        tensors = count = size = 0
        for bucket in agreed(self.comm, self.weights.buckets(version)):
            tensors, count, size = tensors + len(bucket.specs), count + 1, size + bucket.data.numel()
            if self.comm.rank == 0:
                kept.append(dataclasses.replace(bucket, data=bucket.data.to("cpu", copy=True)))
        self._version, self._buckets, self._sent = version, kept, Sent(tensors, count, size)

    def send(self, version: int) -> Sent:
        if version != self._version:
            raise WeightSyncError(f"version {version} was to be sent, but {self._version} is staged")
        self.comm.from_leader(self._load)
        return self._sent

    def _load(self) -> None:
        assert self.engine is not None, "only the leader talks to the engine"
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        for bucket in self._buckets:
            self.engine.load(dataclasses.replace(bucket, data=bucket.data.to(device)) if device else bucket)


class _GivingCycle(Cycle):
    """The engine's memory is there from `publish` to `collect`, and released otherwise."""

    def publish(self) -> SyncReport:
        """As `Cycle.publish`, which takes the engine's memory back."""
        if self.ledger is not None:
            self.ledger.require_room(self.comm)
        return super().publish()

    def collect(self, step: int) -> list[TrainSample]:
        """As `Cycle.collect`; afterwards the engine's memory is released."""
        samples = super().collect(step)
        before = self.ledger.free() if self.ledger is not None else 0
        with self.span("release"):
            self._surviving(lambda: self.comm.from_leader(lambda: self._lead.engine.release()), needs_weights=False)
        if self.ledger is not None:
            self.ledger.note_room(before)
        return samples


class SharedCycle(_GivingCycle):
    """Its `path` is a `StagedPath`; `offload` is set before the first `publish`. The engine begins released."""

    offload: Offload | None = None

    def publish(self) -> SyncReport:
        """As `Cycle.publish`, but before it the trainer leaves the device: afterwards it is the engine's turn."""
        assert self.offload is not None, "set before the first rollout batch"
        assert not self.offload.is_out, "it is the engine's turn already"
        assert isinstance(self.path, StagedPath)
        with self.span("stage"):
            self.path.stage(self.version + 1)
        with self.span("offload"):
            self.offload.out()
            self.comm.agree(None)  # the engine takes the room when all ranks have left it
        return super().publish()

    def collect(self, step: int) -> list[TrainSample]:
        """As `Cycle.collect`; afterwards it is the trainer's turn."""
        samples = super().collect(step)
        with self.span("reload"):
            self._bring_back()
        return samples

    def _bring_back(self) -> None:
        assert self.offload is not None
        failure = None
        if self.ledger is not None:
            self.ledger.await_room(self.offload.bytes_away)
        try:
            self.offload.back()
        except RuntimeError as error:  # the device has no room for it
            failure = MegatronSglangError(f"the trainer's memory could not come back to its device: {error}")
        self.comm.agree(failure)


class ReleasingCycle(_GivingCycle):
    """While the engine's memory is released, it is the trainer's room."""

    def publish(self) -> SyncReport:
        self._empty_cache()  # what training has left in the allocator is the engine's room
        return super().publish()

    def collect(self, step: int) -> list[TrainSample]:
        samples = super().collect(step)
        self.note_memory("release", same=True)
        return samples

    def before_training(self) -> None:
        """What scoring has left in the allocator is in blocks of other sizes than those that a train step wants."""
        self._empty_cache()

    def _empty_cache(self) -> None:
        if torch.cuda.is_initialized():
            with self.span("empty_cache"):
                torch.cuda.empty_cache()


class SharedPlugin(Plugin):
    """`Plugin` whose cycle is a `SharedCycle`."""

    def _start(self, model: list[Any], optimizer: Any, iteration: int) -> Cycle:
        cycle = super()._start(model, optimizer, iteration)
        assert isinstance(cycle, SharedCycle)
        cycle.offload = Offload(model, optimizer)
        return cycle
