"""The plan of one weight update as figures: bytes by rank pair, buckets, peak extra memory, predicted seconds. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sglang import transfer
from megatron_sglang.plan.cost import H200, Host, Load, Prediction, predict
from megatron_sglang.plan.trainer import is_adapted
from megatron_sglang.transfer import CHUNK_BYTES, SLOTS, Piece, Region

DIGESTS_SENT, DIGESTS_RECEIVED = 1, 2
"""How often a byte is digested: where it is packed; on arrival, and when it is read back from the parameters."""

_EXPERT = re.compile(r"(?<=\.experts\.)\d+\.")
"""What tells the experts of a layer apart; grouped, they are one unit."""

MERGE_TEMPORARIES, FP32 = 6, 4
"""A merge takes its weights in fp32 chunk by chunk, a weight at least (`weights/merge.py`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Extra bytes of one rank at the worst bucket, beside base weights and engine."""

    send: int
    receive: int
    merged: int
    """Of one unit that is merged in one go, and of those that the next bucket needs again; engine's dtype."""
    temporaries: int
    """Of the merge, in fp32."""
    read_back: int
    """Of the engine ranks that it hands over to, in their processes: what they have written, read again."""

    @property
    def total(self) -> int:
        return self.send + self.receive + self.merged + self.temporaries + self.read_back


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
    memory: Sequence[Memory]
    seconds: Prediction

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
    shards: Collection[Region], slots: Sequence[Region], ranks: int, itemsize: int, bucket_bytes: int, host: Host = H200
) -> Update:
    """Plan an update as `sync.plan_for` does. shards and slots: of all ranks; ranks: of the trainer; itemsize: of the
    engine's dtype, in bytes.

    Raises `WeightSyncError` for a slot that the shards do not fill.
    """
    machines = [rank // host.gpus for rank in range(ranks)]
    pieces = transfer.make_plan(shards, slots, ranks, machines)
    buckets = transfer.cut(pieces, max(1, bucket_bytes // itemsize))
    pairs = transfer.traffic(pieces, itemsize)
    sizes = adapted_sizes(shards)
    loads = loads_of(pairs, merged_of(buckets, sizes, itemsize), ranks, host.gpus)
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
        memory=_memory(buckets, sizes, ranks, itemsize),
        seconds=predict(loads, len(buckets), host),
    )


def loads_of(pairs: Mapping[tuple[int, int], int], merged: Mapping[int, int], ranks: int, gpus: int) -> list[Load]:
    """One load a rank. pairs: bytes by (source, target); merged: by rank; gpus: of one machine. An engine rank's part
    counts where it is handed over."""
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
            merged=merged.get(rank, 0),
            sent=sent[rank],
            sent_far=far[rank],
            received=received[rank],
            digested=DIGESTS_SENT * packed[rank] + DIGESTS_RECEIVED * received[rank],
        )
        for rank in range(ranks)
    ]


def adapted_sizes(shards: Iterable[Region]) -> Counter[tuple[int, str]]:
    """Elements of each parameter with an adapter, by (trainer rank, parameter)."""
    sizes, adapted = Counter[tuple[int, str]](), dict[str, bool]()
    for shard in shards:
        if adapted.setdefault(shard.name, is_adapted(shard.name)):
            sizes[shard.rank, shard.place.tensor] += shard.box.size
    return sizes


def merged_of(buckets: Iterable[Iterable[Piece]], sizes: Mapping[tuple[int, str], int], itemsize: int) -> Counter[int]:
    """Bytes that each rank merges and packs: whole parameters with an adapter, once unless a later bucket needs them
    again, however little of them travels; of others what travels."""
    merged, kept = Counter[int](), set[tuple[int, str]]()
    for bucket in buckets:
        needed = set[tuple[int, str]]()
        for piece in bucket:
            if (param := (piece.source, piece.here.tensor)) in sizes:
                needed.add(param)
            else:
                merged[piece.source] += piece.size * itemsize
        for param in needed - kept:
            merged[param[0]] += sizes[param] * itemsize
        kept = needed
    return merged


def _memory(
    buckets: Sequence[Sequence[Piece]], sizes: Mapping[tuple[int, str], int], ranks: int, itemsize: int
) -> list[Memory]:
    send, receive, merged, largest = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    largest_part = Counter[int]()
    needs = [_units(bucket, sizes) for bucket in buckets]
    for bucket, units, later in zip(buckets, needs, [*needs[1:], {}], strict=True):
        held, kept = Counter[int](), Counter[int]()
        for (rank, unit), params in units.items():
            size = sum(sizes[rank, name] for name in params) * itemsize
            held[rank] = max(held[rank], size)
            kept[rank] += size if (rank, unit) in later else 0
            largest[rank] = max(largest[rank], *(sizes[rank, name] * FP32 for name in params))
        send |= _by(bucket, "source", itemsize)
        largest_part |= _by(bucket, "target", itemsize)
        merged |= held + kept
    for target, size in largest_part.items():  # each engine rank that a rank hands over to has buffers of its own
        receive[transfer.host_of(target, ranks)] += size
    return [
        Memory(
            send=send[rank],
            receive=SLOTS * receive[rank],
            merged=merged[rank],
            temporaries=MERGE_TEMPORARIES * min(max(CHUNK_BYTES, largest[rank]), merged[rank] // itemsize * FP32),
            read_back=receive[rank],
        )
        for rank in range(ranks)
    ]


def _units(bucket: Iterable[Piece], sizes: Mapping[tuple[int, str], int]) -> dict[tuple[int, str], set[str]]:
    """(rank, unit) -> parameters with an adapter. The experts of a layer are one: they are merged in one go."""
    units: dict[tuple[int, str], set[str]] = {}
    for piece in bucket:
        name = piece.here.tensor
        if (piece.source, name) in sizes:
            units.setdefault((piece.source, _EXPERT.sub("", name)), set()).add(name)
    return units


def _by(bucket: Iterable[Piece], end: str, itemsize: int) -> Counter[int]:
    """Bytes of a bucket by "source" or "target" rank."""
    sizes = Counter[int]()
    for piece in bucket:
        sizes[getattr(piece, end)] += piece.size * itemsize
    return sizes
