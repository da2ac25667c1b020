"""How long one weight update takes, from bytes and measured rates. Pure.

    seconds = max over ranks of (merged / merge + sent / link + received / copy + digested / digest)
            + buckets x hand_over + fixed

All terms of a rank are added: nothing is supposed to overlap. Bytes are those of the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """A rate in bytes a second, or a time in seconds, and where it comes from. derived: from a measured time of several
    steps together; assumed: nobody has measured it."""

    value: float
    kind: Literal["measured", "derived", "assumed"]
    source: str


@dataclass(frozen=True, slots=True)
class Host:
    """What one kind of machine can do. Rates are of one GPU."""

    name: str
    gpus: int
    """In one machine, joined by `link`."""
    merge: Figure
    """Merge adapters and pack, by the bytes that come out."""
    link: Figure
    """all-to-all between the GPUs of a machine."""
    network: Figure
    """Between machines."""
    copy: Figure
    """From the received buffer into the engine's parameters."""
    digest: Figure
    """One digest of the bytes."""
    hand_over: Figure
    """Of one bucket to all engine ranks, besides the copy."""
    fixed: Figure
    """Messages of an update that do not depend on its size."""


MERGE_PACK_EXCHANGE_S, EXPERT_BYTES, RANKS = 0.072, 48 * 128 * 3 * 768 * 2048 * 2, 8
LINK = 287e9
_LEAVES = EXPERT_BYTES / RANKS * (RANKS - 1) / RANKS
_MERGE = EXPERT_BYTES / RANKS / (MERGE_PACK_EXCHANGE_S - _LEAVES / LINK)
HAND_OVERS, HAND_OVERS_S = 12, 0.129
_STREAM = 4.8e12 / 2
"""Half of the memory bandwidth that NVIDIA specifies for an H200."""

H200 = Host(
    name="8 x H200, NVLink",
    gpus=8,
    merge=Figure(
        _MERGE,
        "derived",
        "merge, pack and all-to-all of Qwen3-30B-A3B's experts (58 GB, LoRA 32, 8 GPUs) measured together as "
        "0.072 s, less what the all-to-all needs",
    ),
    link=Figure(LINK, "measured", "all-to-all on 8 GPUs, bytes that leave a GPU"),
    network=Figure(50e9, "assumed", "one 400 Gb/s adapter for each GPU, at its nominal rate"),
    copy=Figure(
        _STREAM, "assumed", "half of the specified memory bandwidth of 4.8 TB/s, since a byte is read and written"
    ),
    digest=Figure(
        _STREAM,
        "assumed",
        "as the copy, for one kernel that reads each word once (SGLang's own checksum of all parameters took "
        "0.09 s for 7.6 GB a GPU, which is 85 GB/s)",
    ),
    hand_over=Figure(
        HAND_OVERS_S / HAND_OVERS - EXPERT_BYTES / RANKS / HAND_OVERS / _STREAM,
        "derived",
        "12 hand-overs of 0.6 GB a rank measured as 0.129 s, less the copy; the prototype's, over HTTP: the product's "
        "line (engine/line.py) asks no HTTP message of a bucket, and has not been timed on GPUs",
    ),
    fixed=Figure(
        0.07 - HAND_OVERS_S / HAND_OVERS,
        "derived",
        "an update of a 1 M parameter model on 2 GPUs measured as 0.07 s, less one hand-over",
    ),
)
"""From two sets of runs on H200s. The merge, link and hand-over rates are those of a prototype of the direct path with
stock SGLang 0.5.17; the product itself has not been timed at this size."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one GPU does in one update, in bytes of the engine's dtype. Trainer rank and engine rank share it."""

    merged: int
    """Weights merged and packed, wherever they go."""
    sent: int
    """To other GPUs of the machine."""
    sent_far: int
    """To GPUs of other machines."""
    received: int
    """Into the engine's parameters, from its own trainer rank included."""
    digested: int
    """Each pass over a byte counts."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds. The first five are of the slowest rank."""

    merge: float
    link: float
    network: float
    copy: float
    digest: float
    hand_over: float
    fixed: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def predict(loads: Sequence[Load], buckets: int, host: Host = H200) -> Prediction:
    """loads: of all ranks. buckets: deliveries of one update."""
    slowest = max((_of_rank(load, host) for load in loads), key=lambda terms: sum(terms.values()))
    return Prediction(**slowest, hand_over=buckets * host.hand_over.value, fixed=host.fixed.value)


def figures(host: Host = H200) -> Mapping[str, Figure]:
    """The host's figures by name."""
    return {
        item.name: getattr(host, item.name) for item in fields(host) if isinstance(getattr(host, item.name), Figure)
    }


def _of_rank(load: Load, host: Host) -> dict[str, float]:
    return {
        "merge": load.merged / host.merge.value,
        "link": load.sent / host.link.value,
        "network": load.sent_far / host.network.value,
        "copy": load.received / host.copy.value,
        "digest": load.digested / host.digest.value,
    }
