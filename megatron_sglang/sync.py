"""Two paths by which a weight version reaches the engine, behind one call: `send`. Collective on all ranks.

    generic   full tensors under their HF names through the engine's own loader: any model, the oracle
    direct    only the rectangles that each engine rank needs, straight into its parameters, by a plan made once

`plan_for` makes the plan, or says why there is none. The direct path is used only after it has given the same engine
digest as the generic one for the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_sglang import layout, transfer
from megatron_sglang.errors import MegatronSglangError, WeightSyncError
from megatron_sglang.interfaces import Comm, DirectEngine, Engine, Weights


@dataclass(frozen=True, slots=True)
class Sent:
    """What one version took."""

    tensors: int
    buckets: int
    bytes: int


class Path(Protocol):
    name: str

    def send(self, version: int) -> Sent:
        """Between `begin_update` and `commit_update`."""
        ...

    def fidelity(self) -> tuple[float, float]:
        """See `interfaces.Weights`."""
        ...


class GenericPath:
    """Full tensors in buckets, handed over by the leader."""

    name = "generic"

    def __init__(self, comm: Comm, weights: Weights, engine: Engine | None) -> None:
        self.comm, self.weights, self.engine = comm, weights, engine
        self.fidelity = weights.fidelity

    def send(self, version: int) -> Sent:
        tensors = count = size = 0
        for bucket in agreed(self.comm, self.weights.buckets(version)):
            self.comm.from_leader(lambda bucket=bucket: _lead(self.engine).load(bucket))
            tensors, count, size = tensors + len(bucket.specs), count + 1, size + bucket.data.numel()
        return Sent(tensors, count, size)


class Deliveries(Protocol):
    """The trainer's side of the direct path (`weights/direct.py`)."""

    buckets: Sequence[Sequence[transfer.Piece]]
    dtype: torch.dtype

    def deliveries(self) -> Iterator[Any]: ...

    def fidelity(self) -> tuple[float, float]: ...


class DirectPath:
    """Each rank hands its engine rank's part over; the leader posts them together.

    serialize: (envelope, flat uint8 tensor) -> payload, of the engine room.
    """

    name = "direct"

    def __init__(
        self,
        comm: Comm,
        sender: Deliveries,
        engine: DirectEngine | None,
        engine_ranks: int,
        serialize: Callable[[Mapping[str, Any], torch.Tensor], str],
    ) -> None:
        self.comm, self.sender, self.engine = comm, sender, engine
        self.engine_ranks, self.serialize = engine_ranks, serialize
        self.fidelity = sender.fidelity
        pieces = [piece for bucket in sender.buckets for piece in bucket]
        self._sent = Sent(
            tensors=len({piece.name for piece in pieces}),
            buckets=len(sender.buckets),
            bytes=sum(piece.size for piece in pieces) * sender.dtype.itemsize,
        )

    def send(self, version: int) -> Sent:
        for delivery in agreed(self.comm, self.sender.deliveries()):
            ticket = self.comm.from_leader(lambda index=delivery.index: _lead(self.engine).ticket(version, index))
            payload = None
            if self.comm.rank < self.engine_ranks:
                dtype = str(delivery.data.dtype).removeprefix("torch.")
                mine = {
                    "rank": self.comm.rank,
                    "lengths": delivery.lengths,
                    "digests": delivery.digests,
                    "dtype": dtype,
                }
                payload = self.serialize(ticket | mine, delivery.data.view(torch.uint8))
            payloads = [given for given in self.comm.gather(payload) if given is not None]
            self.comm.from_leader(lambda ticket=ticket, payloads=payloads: _lead(self.engine).deliver(ticket, payloads))
            if delivery.data.is_cuda:
                torch.cuda.ipc_collect()  # every rank has lent memory, and the engine has given it back
        return self._sent


def plan_for(
    comm: Comm,
    engine: DirectEngine | None,
    engine_ranks: int,
    shapes: Mapping[str, tuple[int, ...]],
    find_shards: Callable[[], list[transfer.Region]],
    limit: int,
) -> list[list[transfer.Piece]]:
    """The transfer plan, installed in the engine; the same on all ranks.

    find_shards: this rank's shards. limit: elements that an engine rank may receive in one delivery.
    Raises `WeightSyncError` on all ranks where the direct path does not apply, with the reason.
    """
    if engine_ranks > comm.world_size:
        raise WeightSyncError(
            f"the engine has {engine_ranks} ranks, the trainer {comm.world_size}; each needs one beside it"
        )
    texts = comm.from_leader(lambda: [found.to_json() for found in _lead(engine).layout(shapes)])
    layouts = [layout.RankLayout.from_json(text) for text in texts]
    if reasons := layout.problems(layouts, shapes):
        raise WeightSyncError("; ".join(reasons[:3]))
    mine, failure = [], None
    try:
        mine = [transfer.row_of(shard) for shard in find_shards()]
    except WeightSyncError as error:
        failure = error
    comm.agree(failure)
    everyone = [transfer.region_from(row) for rows in comm.gather(mine) for row in rows]
    slots = [slot for found in layouts for slot in transfer.slots_of(found, shapes)]
    buckets = transfer.cut(transfer.make_plan(everyone, slots), limit)
    receipts = [
        {"buckets": [transfer.receipt(bucket, found.rank) for bucket in buckets], "constants": constants_of(found)}
        for found in layouts
    ]
    comm.from_leader(lambda: _lead(engine).install_plan(receipts))
    return buckets


def constants_of(found: layout.RankLayout) -> list[tuple[tuple[Any, ...], float]]:
    """Padding that the engine writes itself, as (rectangle, value)."""
    constants = []
    for write in found.writes:
        if write.const is not None:
            if len(write.size) > 2:
                raise WeightSyncError(f"engine rank {found.rank}: the padding of {write.param} is no rectangle")
            (rows, down), (cols, right) = [*zip(write.size, write.strides, strict=True), (1, 1), (1, 1)][:2]
            constants.append(((write.param, write.offset, rows, cols, down, right), write.const))
    return constants


def _lead[E](engine: E | None) -> E:
    assert engine is not None, "only the leader talks to the engine"
    return engine


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
