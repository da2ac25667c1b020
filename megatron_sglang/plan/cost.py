"""How long one weight update takes, from bytes and measured rates. Pure.

    seconds = max over ranks of (merged / merge + sent / link + 2 received / copy + digested / digest)
            + buckets x hand_over + fixed

All terms of a rank are added: nothing is supposed to overlap. Bytes are those of the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

COPIES = 2
"""Into the engine's parameters, and out of them to be read back."""


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
    """From the received buffer into the engine's parameters, or back."""
    digest: Figure
    """One digest of the bytes."""
    hand_over: Figure
    """Of one bucket to all engine ranks, besides the copy."""
    fixed: Figure
    """Messages of an update that do not depend on its size."""


SENT, LEAVES = 7.681e9, 6.342e9
"""Bytes that a rank merges, and that leave its GPU, in the measured update: Qwen3-30B-A3B, EP 8, engine TP 8, bf16."""
MERGE_S, DIGEST_S, LIMIT_S = 0.01633, 0.00298, 0.01977
FEW, FEW_S, MANY, MANY_S = 17, 0.2346, 49, 0.3493
"""Buckets and seconds of the whole update, with buckets of 512 MiB and of 170 MB."""
_STREAM = 4.8e12 / 2
"""Half of the memory bandwidth that NVIDIA specifies for an H200."""
_HAND_OVER = (MANY_S - FEW_S) / (MANY - FEW)
_RATES_S = MERGE_S + LIMIT_S + COPIES * SENT / _STREAM + 3 * DIGEST_S
_RUN = "benchmarks/results/sync_h200_8.json"

H200 = Host(
    name="8 x H200, NVLink",
    gpus=8,
    merge=Figure(SENT / MERGE_S, "measured", f"the merging kernel's time on rank 0 in {_RUN}"),
    link=Figure(LEAVES / LIMIT_S, "measured", f"all_to_all of the same bytes and nothing else in {_RUN}"),
    network=Figure(50e9, "assumed", "one 400 Gb/s adapter for each GPU, at its nominal rate"),
    copy=Figure(
        _STREAM, "assumed", "half of the specified memory bandwidth of 4.8 TB/s, since a byte is read and written"
    ),
    digest=Figure(SENT / DIGEST_S, "measured", f"the digest kernel's time on rank 0 in {_RUN}"),
    hand_over=Figure(_HAND_OVER, "derived", f"{MANY} buckets took {MANY_S} s and {FEW} took {FEW_S} s in {_RUN}"),
    fixed=Figure(FEW_S - FEW * _HAND_OVER - _RATES_S, "derived", f"what the other figures leave of {FEW_S} s"),
)
"""From one run of the product. Since then an engine rank copies and digests a delivery in single launches, looks for
its parameters once a version instead of once a delivery, and checks all of them in one launch; the trainer starts on
the next bucket before it waits. So hand-over and fixed should have shrunk; no GPU has run that yet."""


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
        "copy": COPIES * load.received / host.copy.value,
        "digest": load.digested / host.digest.value,
    }
