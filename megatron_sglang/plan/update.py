"""The plan of one weight update as figures: bytes by rank pair, buckets, peak extra memory, predicted seconds. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sglang import transfer
from megatron_sglang.plan.cost import H200, Host, Load, Prediction, Steps, predict
from megatron_sglang.transfer import BUFFERS, Piece, Region

DIGESTS_SENT, DIGESTS_RECEIVED = 1, 1
"""Passes that a digest costs: where a byte is packed; when it is read back from the parameters. That of what arrives is
made where it is copied into them (`copy_kernel.py`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Extra bytes of one rank at the worst bucket, beside base weights and engine. On a GPU merging needs none: it
    writes into the send buffer (`weights/merge_kernel.py`)."""

    send: int
    """Of all buffers (`transfer.BUFFERS`)."""
    receive: int
    """As many for each engine rank that it hands over to, which needs none of its own."""

    @property
    def total(self) -> int:
        return self.send + self.receive


@dataclass(frozen=True, slots=True)
class Update:
    """What one weight version takes. Lists have one entry a trainer rank."""

    engine_ranks: int
    tensors: int
    pieces: int
    pairs: Mapping[tuple[int, int], int]
    """Bytes by (trainer rank, engine rank)."""
    buckets: int
    largest: int
    """Bytes of the largest bucket, all ranks together."""
    largest_of_rank: int
    """Bytes that one engine rank gets at most in one bucket."""
    loads: Sequence[Load]
    steps: Steps
    memory: Sequence[Memory]
    seconds: Prediction
    host: Host
    """What the prediction is for."""

    @property
    def total(self) -> int:
        return sum(self.pairs.values())

    @property
    def stays(self) -> int:
        """Bytes that the trainer rank beside their engine rank has itself."""
        ranks = len(self.loads)
        return sum(size for (source, target), size in self.pairs.items() if source == transfer.host_of(target, ranks))

    @property
    def far(self) -> int:
        """Bytes that must leave their machine."""
        return sum(load.sent_far for load in self.loads)


def update_of(
    shards: Collection[Region],
    slots: Sequence[Region],
    ranks: int,
    itemsize: int,
    bucket_bytes: int,
    host: Host = H200,
    buffers: int = BUFFERS,
) -> Update:
    """Plan an update as `sync_plan.plan_for` does. shards and slots: of all ranks; ranks: of the trainer; itemsize: of
    the engine's dtype, in bytes; buffers: of each kind.

    Raises `WeightSyncError` for a slot that the shards do not fill.
    """
    machines = [rank // host.gpus for rank in range(ranks)]
    pieces = transfer.make_plan(shards, slots, ranks, machines)
    buckets = transfer.cut(pieces, max(1, bucket_bytes // itemsize))
    pairs = transfer.traffic(pieces, itemsize)
    loads = loads_of(pairs, ranks, host.gpus)
    steps = steps_of([transfer.traffic(bucket, itemsize) for bucket in buckets], ranks, host.gpus)
    received = [_by(bucket, "target", itemsize) for bucket in buckets]
    return Update(
        engine_ranks=len({slot.rank for slot in slots}),
        tensors=len({piece.name for piece in pieces}),
        pieces=len(pieces),
        pairs=pairs,
        buckets=len(buckets),
        largest=max(sum(sizes.values()) for sizes in received),
        largest_of_rank=max(max(sizes.values()) for sizes in received),
        loads=loads,
        steps=steps,
        memory=_memory(buckets, ranks, itemsize, buffers),
        seconds=predict(loads, steps, host),
        host=host,
    )


def loads_of(pairs: Mapping[tuple[int, int], int], ranks: int, gpus: int) -> list[Load]:
    """One load a rank. pairs: bytes by (source, target); gpus: of one machine. An engine rank's part counts where it is
    handed over."""
    packed, sent, far, received = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    for (source, target), size in pairs.items():
        host = transfer.host_of(target, ranks)
        packed[source] += size
        received[host] += size
        if source // gpus != host // gpus:
            far[source] += size
        elif source != host:
            sent[source] += size
    return [
        Load(
            merged=packed[rank],
            sent=sent[rank],
            sent_far=far[rank],
            received=received[rank],
            digested=DIGESTS_SENT * packed[rank] + DIGESTS_RECEIVED * received[rank],
        )
        for rank in range(ranks)
    ]


def steps_of(pairs: Sequence[Mapping[tuple[int, int], int]], ranks: int, gpus: int) -> Steps:
    """pairs: of each bucket, as for `loads_of`."""
    each = [(loads_of(bucket, ranks, gpus), *_arrivals(bucket, ranks, gpus)) for bucket in pairs]
    return Steps(
        buckets=len(each),
        merged=sum(max(load.merged for load in loads) for loads, _, _ in each),
        moved=sum(max(*(load.sent for load in loads), *near.values(), 0) for loads, near, _ in each),
        far=sum(max(*(load.sent_far for load in loads), *far.values(), 0) for loads, _, far in each),
    )


def _arrivals(pairs: Mapping[tuple[int, int], int], ranks: int, gpus: int) -> tuple[Counter[int], Counter[int]]:
    """Bytes by the rank that takes them in for an engine rank, from its own machine and from others: few engine ranks
    may get what many ranks send, and are busier than any of these."""
    near, far = Counter[int](), Counter[int]()
    for (source, target), size in pairs.items():
        host = transfer.host_of(target, ranks)
        if source // gpus != host // gpus:
            far[host] += size
        elif source != host:
            near[host] += size
    return near, far


def _memory(buckets: Sequence[Sequence[Piece]], ranks: int, itemsize: int, buffers: int) -> list[Memory]:
    send, receive, largest_part = Counter[int](), Counter[int](), Counter[int]()
    for bucket in buckets:
        send |= _by(bucket, "source", itemsize)
        largest_part |= _by(bucket, "target", itemsize)
    for target, size in largest_part.items():  # each engine rank that a rank hands over to has buffers of its own
        receive[transfer.host_of(target, ranks)] += size
    return [Memory(min(buffers, len(buckets)) * send[rank], buffers * receive[rank]) for rank in range(ranks)]


def _by(bucket: Iterable[Piece], end: str, itemsize: int) -> Counter[int]:
    """Bytes of a bucket by "source" or "target" rank."""
    sizes = Counter[int]()
    for piece in bucket:
        sizes[getattr(piece, end)] += piece.size * itemsize
    return sizes
