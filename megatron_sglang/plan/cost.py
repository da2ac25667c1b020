"""How long one weight update takes, from bytes and measured rates. Pure.

    seconds = merged / merge + the larger of (moved / link, own / to_itself) + far / network + received / copy
            + digested / digest + buckets x hand_over + fixed

Ranks meet in every bucket, so what is merged, moved and far counts as the busiest rank's of each bucket, added up
(`Steps`); the rest as the busiest rank's of all. What goes to others and what a rank hands to itself is one exchange;
nothing else is supposed to overlap. Bytes are those of the engine's dtype.
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
    to_itself: Figure
    """The part of it that a rank has for the engine rank on its own GPU."""
    network: Figure
    """Between machines."""
    copy: Figure
    """From the received buffer into the engine's parameters, with a digest on the way."""
    digest: Figure
    """One digest of the bytes."""
    hand_over: Figure
    """Of one bucket to all engine ranks, besides the copy."""
    fixed: Figure
    """Messages of an update that do not depend on its size."""


HAND_OVER_S, FIXED_S = 0.00114, 0.0225
"""Of the run of 2 GPUs: 12.5 ms to begin and to publish (`sync/begin_s`, `sync/verify_s`), 10 ms around the stream by a
timeline of an older run's marks; what is left beside the bytes, by 65 buckets. With it goes what kernels take beyond
the rates here, and the proof at the end, which also grows with the bytes."""
TO_ITSELF = Figure(
    61.064e9 / 0.03274, "measured", "all_to_all of one GPU with itself in benchmarks/results/sync_h200_1.json"
)


def _h200(gpus: int, held: float, leaves: float, merge_s: float, link_s: float, digest_s: float) -> Host:
    """held, leaves: bytes that a rank merges, and that leave its GPU, in the measured update of Qwen3-30B-A3B's shape
    in bf16, EP and engine TP as many as GPUs. Seconds: of the merging kernel and of the digest kernel on rank 0, and of
    an all_to_all of the same bytes."""
    run = f"benchmarks/results/sync_h200_{gpus}.json"
    fit = "the median of 200 updates on 2 GPUs (benchmarks/results/sync_h200_2.json)"
    return Host(
        name=f"{gpus} x H200, NVLink",
        gpus=gpus,
        merge=Figure(held / merge_s, "measured", f"the merging kernel's time on rank 0 in {run}"),
        link=Figure(leaves / link_s, "measured", f"all_to_all of the same bytes and nothing else in {run}"),
        to_itself=TO_ITSELF,
        network=Figure(50e9, "assumed", "one 400 Gb/s adapter for each GPU, at its nominal rate"),
        copy=Figure(
            4.8e12 / 2,
            "assumed",
            "half of the specified memory bandwidth of 4.8 TB/s, since a byte is read and written",
        ),
        digest=Figure(held / digest_s, "measured", f"the digest kernel's time on rank 0 in {run}"),
        hand_over=Figure(HAND_OVER_S, "derived", f"{fit}: what is left, by 65 buckets"),
        fixed=Figure(FIXED_S, "derived", f"{fit}: to begin and to publish, and 10 ms of messages between"),
    )


H200 = _h200(8, 7.681e9, 6.342e9, 0.01633, 0.01977, 0.00298)
MEASURED = {
    2: _h200(2, 30.571e9, 14.496e9, 0.04461, 0.08457, 0.01133),
    4: _h200(4, 15.285e9, 10.872e9, 0.02794, 0.08222, 0.00593),
    8: H200,
}
"""By GPUs that take part. With fewer the links are slower: a pair of GPUs does not use all of its lanes. With 4 and 8
only older code was measured, of which merging, exchange and digest are as they were."""


def host_for(gpus: int) -> Host:
    """Of a machine of which so many GPUs take part: the next larger one that was measured, or the largest."""
    measured = next((count for count in sorted(MEASURED) if count >= gpus), max(MEASURED))
    return MEASURED[measured]


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

    @property
    def own(self) -> int:
        """Merged for the engine ranks on this GPU."""
        return self.merged - self.sent - self.sent_far


@dataclass(frozen=True, slots=True)
class Steps:
    """Bytes of the busiest rank of each bucket, added up over the buckets."""

    buckets: int
    merged: int
    moved: int
    """Sent to, or received from, other GPUs of the machine, whichever is more."""
    far: int
    """The same of other machines: a network adapter takes in no more a second than it sends."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds."""

    merge: float
    link: float
    to_itself: float
    network: float
    copy: float
    digest: float
    hand_over: float
    fixed: float

    @property
    def total(self) -> float:
        """Link and to_itself are parts of one exchange, of which the longer counts."""
        return sum(asdict(self).values()) - min(self.link, self.to_itself)


def predict(loads: Sequence[Load], steps: Steps, host: Host = H200) -> Prediction:
    """loads: of all ranks."""
    return Prediction(
        merge=steps.merged / host.merge.value,
        link=steps.moved / host.link.value,
        to_itself=max(load.own for load in loads) / host.to_itself.value,
        network=steps.far / host.network.value,
        copy=max(load.received for load in loads) / host.copy.value,
        digest=max(load.digested for load in loads) / host.digest.value,
        hand_over=steps.buckets * host.hand_over.value,
        fixed=host.fixed.value,
    )


def figures(host: Host = H200) -> Mapping[str, Figure]:
    """The host's figures by name."""
    return {
        item.name: getattr(host, item.name) for item in fields(host) if isinstance(getattr(host, item.name), Figure)
    }
