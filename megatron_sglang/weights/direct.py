"""The direct path's sending side: merge what is owned, pack what travels, one all-to-all for each bucket and round.

After the all-to-all, trainer rank k holds exactly the bytes that engine rank k needs, in one flat tensor, on the device
that they share if they share one. Where there are more engine ranks than trainer ranks beside them (`hosts`), there are
several rounds: round j is for engine ranks j * hosts .. j * hosts + hosts - 1. Every element travels once, and no rank
ever holds a full tensor that it does not own. The plan depends on placement alone, so what each rank does with each
bucket is worked out once (`_Part`). The words (piece, bucket, delivery) are explained in `transfer.py`; a unit is
what is merged in one go (`merge.Unit`).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_sglang import transfer
from megatron_sglang.copies import Copy, fold
from megatron_sglang.digests import digests_of, segments_of
from megatron_sglang.transfer import BUFFERS, Piece
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weights.merge import MergeStats, Unit, factored, kernel_for, merged, units_of


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one rank hands to engine rank `target`: `data` [elements] in the engine's dtype, one segment from each
    trainer rank in rank order, with the segments' lengths in elements and their digests, computed at the source.

    memory: the receive buffer with the number `buffer`, with which `data` begins; the same for every delivery to this
    target that has this number.
    """

    target: int
    index: int
    buffer: int
    memory: torch.Tensor
    data: torch.Tensor
    lengths: tuple[int, ...]
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's part of one bucket. Sizes are in elements, by round and trainer rank."""

    units: dict[int, list[Copy]]
    """Number of a unit that torch merges -> copies from its merged weights into the send buffer. All ranks of a TP
    group have the same order, since merging may be collective over them."""
    fused: list[int]
    """Units that the kernel merges straight into the send buffer, in such an order too: it needs their gathered
    factors."""
    launch: Any
    """The kernel's work (`merge_kernel.Launch`); None: nothing of `fused` is sent from here."""
    send_sizes: list[list[int]]
    receive_sizes: list[list[int]]

    def offset_of_round(self, number: int) -> int:
        """Elements in the send buffer before those of round `number`."""
        return sum(sum(sizes) for sizes in self.send_sizes[:number])


class DirectSender:
    """Sends weight versions by a plan. Collective: all ranks iterate together.

    buckets: the plan as `transfer.cut` gives it; the same on all ranks. shapes: of the HF tensors. hosts: how many
    trainer ranks, the first ones, hand over; None: all. buffers: how many there are to send from, and as many to
    receive into for each round (`transfer.BUFFERS`); may be set anew between two versions.
    """

    def __init__(
        self,
        bridge: Any,
        model_chunks: list[torch.nn.Module],
        buckets: Sequence[Sequence[Piece]],
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, ...]],
        hosts: int | None = None,
        buffers: int = BUFFERS,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dtype, self.buckets, self.hosts, self.buffers = dtype, buckets, hosts or self.world_size, buffers
        last = max((piece.target for bucket in buckets for piece in bucket), default=0)
        self.rounds: Sequence[int] = range(last // self.hosts + 1)
        self.stats = MergeStats()
        self._units = units_of(bridge, model_chunks)
        self._where = {
            name: (number, at) for number, unit in enumerate(self._units) for at, name in enumerate(unit.names)
        }
        """Bridge's parameter name -> number of its unit, and which of the unit's weights it is."""
        self._device = self._units[0].bases[0].device
        sources: defaultdict[str, set[int]] = defaultdict(set)
        for piece in (piece for bucket in buckets for piece in bucket):
            sources[piece.here.tensor].add(piece.source)
        self._beside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        """For the exchange of digests, see `_tell`."""
        self._shares = [
            torch.tensor(self._share(unit, sources), dtype=torch.float64, device=self._device) for unit in self._units
        ]
        self._times = _times(buckets, shapes)
        self._kernel, self._fused = self._fusable()
        self._parts = [self._part(bucket) for bucket in buckets]
        self._segments: dict[tuple[int, int], Any] = {}
        """By bucket and round: `digest_kernel.Segments` of what is sent, which digests all parts in one launch; None
        where they are digested one by one. Made with the first version."""

    @torch.no_grad()
    def deliveries(self, free: Callable[[int], None], failed: Callable[[], bool]) -> Iterator[Delivery]:
        """One delivery for each bucket and round, on every rank (empty where no engine rank is handed anything).

        free: returns when delivery number n of every round has been taken, so that its buffers may be overwritten.
        failed: has this rank an error? Each exchange carries the answer, and all ranks end after the same one.
        """
        self.stats = MergeStats()
        largest = max(part.offset_of_round(len(self.rounds)) for part in self._parts)
        sends = [self._buffer(largest) for _ in range(min(self.buffers, len(self._parts)))]
        receives = [
            [self._buffer(max(sum(part.receive_sizes[number]) for part in self._parts)) for _ in range(self.buffers)]
            for number in self.rounds
        ]
        # Working ahead: the next bucket is merged while this one's all-to-all runs. Not where merging gathers factors
        # over TP, because two groups' collectives at a time may block each other.
        ahead = len(sends) > 1 and not any(unit.is_collective for unit in self._units)
        counted: set[int] = set()
        kept: dict[int, torch.Tensor] = {}
        self._merge_part(0, sends[0], counted, kept)
        for index in range(len(self._parts)):
            if index >= self.buffers:
                free(index - self.buffers)
            under_way = [
                self._exchange(index, number, sends[index % len(sends)], receives[number][index % self.buffers])
                for number in self.rounds
            ]
            if not ahead:
                self._tell(under_way, failed())
                for exchange in under_way:
                    exchange.before_next()
            # The GPU is given the next merge before the host waits for this bucket's digests. Working ahead, it gets it
            # even before the digests are exchanged: where all streams share one queue, that wait would hold it up.
            if index + 1 < len(self._parts):
                self._merge_part(index + 1, sends[(index + 1) % len(sends)], counted, kept)
            if ahead:
                self._tell(under_way, failed())
            for exchange in under_way:
                delivery = exchange.delivery()
                if delivery is None:
                    return
                yield delivery

    def fidelity(self) -> MergeFidelity:
        """See `interfaces.Weights`."""
        return self.stats.fidelity()

    def _buffer(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self._device)

    def _share(self, unit: Unit, sources: dict[str, set[int]]) -> list[float]:
        """How much of each weight's change this rank counts (`MergeStats.add`): the ranks that merge a weight count
        equal parts of it. sources: parameter name -> ranks that send of it."""
        if unit.is_collective:
            return [1 / unit.replicas] * len(unit.names)
        return [1 / len(sources[name]) if self.rank in sources[name] else 0.0 for name in unit.names]

    def _part(self, bucket: Sequence[Piece]) -> _Part:
        """What this rank merges, sends and receives of a bucket."""
        mine = transfer.outgoing(bucket, self.rank)
        rectangles = []
        for piece in mine:
            number, at = self._where[piece.here.tensor]
            offset = piece.here.offset + at * self._units[number].bases[0].numel()
            rectangles.append(transfer.rectangle(piece, replace(piece.here, tensor=str(number), offset=offset)))
        copies: defaultdict[int, list[Copy]] = defaultdict(list)
        for copy in fold(rectangles):
            if int(copy.tensor) not in self._fused:
                copies[int(copy.tensor)].append(copy)
        send_sizes, receive_sizes = Counter[int](), Counter[tuple[int, int]]()
        for piece in mine:
            send_sizes[piece.target] += piece.size
        for piece in bucket:
            receive_sizes[piece.target, piece.source] += piece.size
        # The factors of a dense layer are gathered over TP, so all who hold it merge it, whoever of them sends.
        touched = {self._where[piece.here.tensor][0] for piece in bucket if piece.here.tensor in self._where}
        joint = {number for number in touched if self._units[number].is_collective}
        by_torch = self._in_order(copies.keys() | (joint - self._fused))
        sent = {self._where[piece.here.tensor][0] for piece in mine}
        fused = self._in_order((sent | joint) & self._fused)
        ranks = range(self.world_size)
        return _Part(
            units={number: copies[number] for number in by_torch},
            fused=fused,
            launch=self._launch(mine, fused),
            send_sizes=[[send_sizes[self._target(number, rank)] for rank in ranks] for number in self.rounds],
            receive_sizes=[
                [receive_sizes[self._target(number, self.rank), rank] for rank in ranks] for number in self.rounds
            ],
        )

    def _in_order(self, numbers: Iterable[int]) -> list[int]:
        """By name: an order that all ranks of a TP group share."""
        return sorted(numbers, key=lambda number: self._units[number].names)

    def _fusable(self) -> tuple[Any, set[int]]:
        """The module of the kernel that merges straight into the send buffer, and the numbers of the units that it
        takes: those with the dtypes of the first one, since a launch has one dtype for all weights."""
        kernels = {number: kernel_for(unit) for number, unit in enumerate(self._units)}
        found = {number: self._units[number].dtypes for number, kernel in kernels.items() if kernel is not None}
        if not found:
            return None, set()
        common = next(iter(found.values()))
        return kernels[next(iter(found))], {number for number, dtypes in found.items() if dtypes == common}

    def _launch(self, mine: Sequence[Piece], fused: Sequence[int]) -> Any:
        """One kernel job for each piece of a unit in `fused`, in the order of the send buffer; None: there is none."""
        first_weight, weights, flat, jobs = {}, 0, 0, []
        for number in fused:
            first_weight[number] = weights
            weights += len(self._units[number].bases)
        for piece in mine:
            number, at = self._where[piece.here.tensor]
            if number in first_weight:
                unit, here = self._units[number], piece.here
                width = unit.bases[0].shape[1]
                assert (here.row_stride, here.col_stride) == (width, 1), "a shard lies row by row (shards.py)"
                row, col = divmod(here.offset, width)
                place = (first_weight[number] + at, row, col, piece.rows, piece.cols, flat)
                share = 1 / self._times[piece.name]
                jobs.append(self._kernel.Job(*place, width, unit.rank, unit.scale, unit.layer, share))
            flat += piece.size
        return self._kernel.Launch(jobs, self._device) if jobs else None

    def _merge_part(self, index: int, send: torch.Tensor, counted: set[int], kept: dict[int, torch.Tensor]) -> None:
        """Merge what this rank sends of a bucket into the send buffer. counted: units whose change `stats` has. kept:
        merged weights of the bucket before that are needed again."""
        part = self._parts[index]
        later = self._parts[index + 1].units if index + 1 < len(self._parts) else {}
        for number, copies in part.units.items():
            weights = kept.pop(number) if number in kept else self._merge(number, counted)
            for copy in copies:
                copy.of_flat(send).copy_(copy.of(weights))
            if number in later:
                kept[number] = weights
        factors = [factored(self._units[number]) for number in part.fused]
        if part.launch is not None:
            sums = part.launch.run(factors, send)
            self.stats.add_sums(part.launch.layers, sums)

    def _target(self, number: int, rank: int) -> int:
        """Engine rank that trainer rank `rank` hands over to in round `number`; -1: none."""
        return number * self.hosts + rank if rank < self.hosts else -1

    def _merge(self, number: int, counted: set[int]) -> torch.Tensor:
        """A unit's merged weights, flat. A unit may be merged for several buckets; its change counts once."""
        stats = None if number in counted else self.stats
        counted.add(number)
        return merged(self._units[number], self.dtype, stats, self._shares[number]).contiguous().view(-1)

    def _exchange(self, index: int, number: int, send: torch.Tensor, memory: torch.Tensor) -> _Exchange:
        """Begin the all-to-all of a bucket's round `number`, and the digests of what goes out in it."""
        part = self._parts[index]
        send_sizes, receive_sizes = part.send_sizes[number], part.receive_sizes[number]
        outgoing = send[part.offset_of_round(number) : part.offset_of_round(number + 1)]
        incoming = memory[: sum(receive_sizes)]
        work = dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, async_op=True)
        key = index, number
        if key not in self._segments:
            self._segments[key] = segments_of(outgoing, send_sizes)
        segments = self._segments[key]
        digests = segments.digests(outgoing) if segments is not None else digests_of(outgoing.split(send_sizes))
        place = (self._target(number, self.rank), index, index % self.buffers)
        return _Exchange(place, memory, incoming, tuple(receive_sizes), work, digests)

    def _tell(self, under_way: Sequence[_Exchange], failed: bool) -> None:
        """Exchange the digests, after all all-to-alls of the bucket, because a group must not run two collectives side
        by side. In a stream of its own, which waits for those but not for this rank's next merge."""
        with torch.cuda.stream(self._beside) if self._beside is not None else contextlib.nullcontext():
            for exchange in under_way:
                exchange.wait()
            for exchange in under_way:
                exchange.tell(failed)


class _Exchange:
    """An all-to-all under way. Used in this order: `wait`, `tell`, maybe `before_next`, `delivery`.

    place: target, bucket and buffer of the delivery. work: torch's handle of the all-to-all. digests: int64 [ranks], of
    the segments that this rank sends, begun but not waited for.
    """

    def __init__(
        self,
        place: tuple[int, int, int],
        memory: torch.Tensor,
        data: torch.Tensor,
        lengths: tuple[int, ...],
        work: Any,
        digests: torch.Tensor,
    ) -> None:
        self._place, self._memory, self._data, self._lengths = place, memory, data, lengths
        self._work, self._digests = work, digests
        self._digested, self._done = None, None
        if digests.is_cuda:
            self._digested, self._done = torch.cuda.Event(), torch.cuda.Event()
            self._digested.record()

    def wait(self) -> None:
        """Wait for data and digests; on a GPU the current stream waits, not the host."""
        if self._digested is not None:
            self._digested.wait()
        self._work.wait()

    def tell(self, failed: bool) -> None:
        """Exchange the digests, and whether this rank has failed. Collective."""
        told = torch.stack([self._digests, torch.full_like(self._digests, int(failed))], dim=1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told)
        self._heard = heard
        if self._done is not None:
            self._heard = torch.empty(heard.shape, dtype=heard.dtype, pin_memory=True)
            self._heard.copy_(heard, non_blocking=True)
            self._done.record()

    def before_next(self) -> None:
        """After `tell`: what this rank's stream is given from here on may overwrite what was sent."""
        if self._done is not None:
            self._done.wait()

    def delivery(self) -> Delivery | None:
        """Waits until it is complete on its device. None on all ranks where one has failed."""
        if self._done is not None:
            self._done.synchronize()
        digests, failures = zip(*self._heard.tolist(), strict=True)
        return None if any(failures) else Delivery(*self._place, self._memory, self._data, self._lengths, digests)


def _times(buckets: Iterable[Iterable[Piece]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """How often each element of an HF tensor travels: to several engine ranks if they hold it several times."""
    sizes = Counter[str]()
    for piece in (piece for bucket in buckets for piece in bucket):
        sizes[piece.name] += piece.size
    return {name: size / math.prod(shapes[name]) for name, size in sizes.items()}
