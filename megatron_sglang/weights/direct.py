"""The direct path's sending side: merge what is owned, pack what travels, one all-to-all for each bucket.

After it, trainer rank k holds exactly the bytes that engine rank k needs, in one flat tensor on the device they share.
Every element travels once, and no rank ever holds a full tensor that it does not own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sglang.buckets import digest
from megatron_sglang.transfer import Piece
from megatron_sglang.weights.merge import MergeStats, adapted_weights, merged, replicas_of


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one rank hands to the engine rank beside it: `data` [elements] in the engine's dtype, one segment from each
    trainer rank in rank order, with the segments' lengths in elements and their digests, computed at the source."""

    index: int
    data: torch.Tensor
    lengths: tuple[int, ...]
    digests: tuple[int, ...]


class DirectSender:
    """Sends weight versions by a plan. Collective: all ranks iterate together.

    buckets: the plan, cut; the same on all ranks. Pieces of a bucket lie in a segment in the plan's order.
    """

    def __init__(
        self,
        bridge: Any,
        model_chunks: list[torch.nn.Module],
        buckets: Sequence[Sequence[Piece]],
        dtype: torch.dtype,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dtype = dtype
        self.buckets = buckets
        self.stats = MergeStats()
        self._counted: set[str] = set()
        self._adapted = adapted_weights(model_chunks)
        self._sources: defaultdict[str, set[int]] = defaultdict(set)
        for piece in (piece for bucket in buckets for piece in bucket):
            self._sources[piece.here.tensor].add(piece.source)
        tasks = bridge.get_conversion_tasks(model_chunks)
        self._weights = {
            task.global_param_name: task.param_weight
            for task in tasks
            if task is not None and task.param_weight is not None
        }

    @torch.no_grad()
    def deliveries(self) -> Iterator[Delivery]:
        """One delivery for each bucket, on every rank (empty where no engine rank sits)."""
        self.stats, self._counted = MergeStats(), set()
        merged_weights: dict[str, torch.Tensor] = {}
        for index, bucket in enumerate(self.buckets):
            wanted = {piece.here.tensor for piece in bucket}
            merged_weights = {name: kept for name, kept in merged_weights.items() if name in wanted}
            mine = {piece.here.tensor for piece in bucket if piece.source == self.rank}
            for name in sorted(wanted - merged_weights.keys()):
                # The factors of a dense layer are gathered over TP: all who hold it take part, whoever sends.
                if name in mine or (name in self._weights and self._is_collective(name)):
                    merged_weights[name] = self._merged(name)
            yield self._exchange(index, bucket, merged_weights)

    def fidelity(self) -> tuple[float, float]:
        """See `interfaces.Weights`."""
        return self.stats.fidelity()

    def _is_collective(self, name: str) -> bool:
        wrapper, _ = self._adapted.get(id(self._weights[name]), (None, None))
        group = getattr(wrapper.adapter, "tp_group", None) if wrapper is not None else None
        return group is not None and group.size() > 1

    def _merged(self, name: str) -> torch.Tensor:
        """The whole local weight, flat, merged, in the engine's dtype."""
        base = self._weights[name]
        adapter = self._adapted.get(id(base))
        weight = base
        if adapter is not None:
            # A weight may be merged for several buckets, and by those replicas that send; its change counts once.
            stats = None if name in self._counted else self.stats
            self._counted.add(name)
            mergers = replicas_of(base) if self._is_collective(name) else len(self._sources[name])
            weight = merged(base, *adapter, stats, mergers)
        return weight.detach().to(self.dtype).contiguous().view(-1)

    def _exchange(self, index: int, bucket: Sequence[Piece], weights: dict[str, torch.Tensor]) -> Delivery:
        outgoing = sorted((piece for piece in bucket if piece.source == self.rank), key=lambda piece: piece.target)
        send_sizes, receive_sizes = [0] * self.world_size, [0] * self.world_size
        for piece in outgoing:
            send_sizes[piece.target] += piece.size
        for piece in bucket:
            if piece.target == self.rank:
                receive_sizes[piece.source] += piece.size
        device = next(iter(self._weights.values())).device
        send = torch.empty(sum(send_sizes), dtype=self.dtype, device=device)
        offset = 0
        for piece in outgoing:
            here = piece.here
            source = weights[here.tensor].as_strided(
                (piece.rows, piece.cols), (here.row_stride, here.col_stride), here.offset
            )
            send[offset : offset + piece.size].view(piece.rows, piece.cols).copy_(source)
            offset += piece.size
        receive = torch.empty(sum(receive_sizes), dtype=self.dtype, device=device)
        dist.all_to_all_single(receive, send, receive_sizes, send_sizes)
        digests = torch.tensor([digest(part) for part in send.split(send_sizes)], device=device)
        received_digests = torch.empty_like(digests)
        dist.all_to_all_single(received_digests, digests)
        return Delivery(index, receive, tuple(receive_sizes), tuple(received_digests.tolist()))
