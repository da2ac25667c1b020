"""The transfer plan of the direct path: made from the engine's layout and the trainer's shards, once for a placement.

    engine's layout (`layout.RankLayout`)  x  trainer's shards (`transfer.Region`)  ->  buckets of `transfer.Piece`

The same on all ranks. What an engine rank is told of it is its receipt: where each delivery goes in its parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from megatron_sglang import layout, transfer
from megatron_sglang.copies import Copy
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.interfaces import Comm, DirectEngine, leaders

type Buckets = list[list[transfer.Piece]]


class Plans:
    """Keeps the last plan, with a hash of all that it depends on: an engine that is started again is usually laid out
    as before, and a model of 18,000 tensors on 8 ranks takes seconds to plan."""

    def __init__(self) -> None:
        self._key, self._buckets = "", []

    def of(self, inputs: Sequence[Any], make: Callable[[], Buckets]) -> Buckets:
        """The plan for these inputs (JSON values): the kept one, or what `make` gives."""
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        if key != self._key:
            self._key, self._buckets = key, make()
        return self._buckets


def plan_for(
    comm: Comm,
    engine: DirectEngine | None,
    engine_ranks: int,
    shapes: Mapping[str, tuple[int, ...]],
    find_shards: Callable[[], list[transfer.Region]],
    limit: int,
    hosts: int | None = None,
    plans: Plans | None = None,
) -> Buckets:
    """Make the transfer plan and install it in the engine; the same on all ranks. plans: keeps it for the next time.

    find_shards: this rank's shards. limit: elements that an engine rank may receive in one delivery. hosts: how many
    trainer ranks, the first ones, can hand over; None: all.
    Raises `WeightSyncError` on all ranks where the direct path does not apply, with the reason.
    """
    texts = comm.from_leader(lambda: [found.to_json() for found in leaders(engine).layout(shapes)])
    layouts = [layout.RankLayout.from_json(text) for text in texts]
    if len(layouts) != engine_ranks:
        raise WeightSyncError(f"the engine described {len(layouts)} ranks, expected {engine_ranks}")
    if reasons := layout.problems(layouts, shapes):
        raise WeightSyncError("; ".join(reasons[:3]))
    mine, failure = [], None
    try:
        mine = [transfer.row_of(shard) for shard in find_shards()]
    except WeightSyncError as error:
        failure = error
    comm.agree(failure)
    rows = [row for rows in comm.gather(mine) for row in rows]
    machines = comm.gather(int(os.environ.get("GROUP_RANK", "0")))  # torchrun's number of the node

    def make() -> Buckets:
        slots = [slot for found in layouts for slot in transfer.slots_of(found, shapes)]
        everyone = [transfer.region_from(row) for row in rows]
        return transfer.cut(transfer.make_plan(everyone, slots, hosts or comm.world_size, machines), limit)

    buckets = (plans or Plans()).of([texts, rows, machines, hosts, limit], make)
    comm.from_leader(lambda: leaders(engine).install_plan([receipt_of(found, buckets) for found in layouts]))
    return buckets


def receipt_of(found: layout.RankLayout, buckets: Sequence[Sequence[transfer.Piece]]) -> dict[str, Any]:
    """What one engine rank is told: the copies of every delivery, and the constants that it writes itself."""
    copies = [[astuple(copy) for copy in bucket] for bucket in transfer.receipts(buckets, found.rank)]
    return {"buckets": copies, "constants": [(astuple(copy), value) for copy, value in constants_of(found)]}


def constants_of(found: layout.RankLayout) -> list[tuple[Copy, float]]:
    """Padding that the engine writes itself, with its value."""
    return [
        (Copy(write.param, write.offset, 0, write.size, write.strides, (0,) * len(write.size)), write.const)
        for write in found.writes
        if write.const is not None
    ]
