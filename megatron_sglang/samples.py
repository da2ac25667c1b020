"""How the leader's samples reach all ranks: as JSON, but for the experts of their tokens, which are raw bytes.

512 samples of 4,096 tokens have 800 MB of experts' numbers in a model of 48 layers with top 8. Every rank gets all of
them, and keeps those of its micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_sglang.interfaces import Comm
from megatron_sglang.types import RoutedExperts, TrainSample


def to_all(comm: Comm, produce: Callable[[], Sequence[TrainSample]]) -> list[TrainSample]:
    """Run `produce` on rank 0; the same list on every rank. Its error is raised on all ranks."""
    told: list[bytes] = []

    def rows() -> list[dict[str, Any]]:
        samples = produce()
        told.extend(sample.routed_experts.data for sample in samples if sample.routed_experts is not None)
        return [_row(sample) for sample in samples]

    found = comm.from_leader(rows)
    sizes = [row["routed_experts"]["data"] for row in found if row["routed_experts"] is not None]
    parts = iter(comm.bytes_from_leader(told, sizes))
    return [_sample(row, parts) for row in found]


def _row(sample: TrainSample) -> dict[str, Any]:
    """JSON values; of the experts' bytes how many there are."""
    row = asdict(replace(sample, routed_experts=None))
    if (routed := sample.routed_experts) is not None:
        row["routed_experts"] = {"tokens": routed.tokens, "width": routed.width, "data": len(routed.data)}
    return row


def _sample(row: dict[str, Any], parts: Iterator[bytes]) -> TrainSample:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    if (routed := values["routed_experts"]) is not None:
        values["routed_experts"] = RoutedExperts(**routed | {"data": next(parts)})
    return TrainSample(**values)
