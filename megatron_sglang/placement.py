"""Which rank is what: Megatron's order of parallel dimensions, the engines, and who shares devices. Pure arithmetic.

Megatron numbers ranks tp first, then cp, dp, pp. Expert layers cut the same ranks of a pipeline stage anew: expert
tensor parallelism (1 here) first, then ep, then expert data parallelism.

    colocated   engine ranks on the trainer ranks' devices, at the same time
    shared      the same, in turns: one of the two is out of the device's memory
    split       engine ranks on devices of their own, numbered after the trainer's
    external    engines that run already, wherever they are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal

from megatron_sglang.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Coordinates of one trainer rank. `ep` and `expert_dp` are those of the expert layers, which cut a stage anew."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Sizes of one run. Raises `ConfigError` where they do not divide."""

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        model_ranks = self.tp * self.cp * self.pp
        if self.world_size % model_ranks:
            raise ConfigError(
                f"TP {self.tp} x CP {self.cp} x PP {self.pp} = {model_ranks} ranks do not divide the {self.world_size} "
                "ranks of torchrun; change --nproc-per-node or a parallel size"
            )
        if (self.world_size // self.pp) % self.ep:
            raise ConfigError(
                f"EP {self.ep} does not divide the {self.world_size // self.pp} ranks of a pipeline stage; "
                "change --expert-model-parallel-size"
            )

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp * self.pp)

    def of(self, rank: int) -> RankPlace:
        stage = self.world_size // self.pp
        within = rank % stage
        return RankPlace(
            rank=rank,
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=within // (self.tp * self.cp),
            pp=rank // stage,
            ep=within % self.ep,
            expert_dp=within // self.ep,
        )

    def table(self) -> str:
        """One line for each rank, for people."""
        names = [field.name for field in fields(RankPlace)]
        rows = [names, *([str(value) for value in astuple(self.of(rank))] for rank in range(self.world_size))]
        return "\n".join("  ".join(map(str.rjust, row, map(len, names))) for row in rows)


def engines(ranks: int, tp_size: int) -> list[range]:
    """For each engine the trainer ranks that it sits beside: runs of `tp_size` out of the `ranks` of the leader's
    node."""
    if ranks % tp_size:
        divisors = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        raise ConfigError(
            f"engine.tp_size={tp_size} does not divide the {ranks} trainer ranks of this node; "
            f"set --rollout-num-gpus-per-engine to {' or '.join(divisors)}"
        )
    return [range(first, first + tp_size) for first in range(0, ranks, tp_size)]


Mode = Literal["colocated", "split", "shared", "external"]

TRAINER_SHARE = 0.7
"""Of the memory that the engine leaves, what frozen weights may take; the rest is for adapters, activations, gradients,
the optimizer and a bucket of a weight update. A rule of thumb: where it errs, name the mode."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How trainer and engines share this node, and why, in one line."""

    mode: Mode
    why: str


def choose_mode(
    wanted: Literal["auto", "colocated", "split", "shared"],
    *,
    devices: int,
    trainer_ranks: int,
    external: Sequence[str] = (),
    fits: bool | None = None,
    art: bool = False,
) -> Choice:
    """The mode of a run. Raises `ConfigError` for one that this node cannot give.

    devices: visible CUDA devices of the node; 0: a CPU. trainer_ranks: of this node. external: URLs of engines.
    fits: do both models fit on a device (`both_fit`); None: not known. art: ART's rule for "auto", which is split with
    two devices or more and shared with one.
    """
    if external:
        if wanted != "auto":
            raise ConfigError(
                f"rollout.mode={wanted}, but engine.external names {len(external)} engines that run already; leave one "
                "of them out"
            )
        return Choice("external", f"engine.external names {', '.join(external)}")
    has = f"{devices} CUDA device{'s' * (devices != 1)}" if devices else "no CUDA device"
    if devices and devices < trainer_ranks:
        raise ConfigError(f"{trainer_ranks} trainer ranks on a node with {has}; lower torchrun's --nproc-per-node")
    if wanted == "split" and devices and devices == trainer_ranks:
        raise ConfigError(
            f"rollout.mode=split with {has} and {trainer_ranks} trainer ranks leaves none for the engine; lower "
            "torchrun's --nproc-per-node, or choose colocated"
        )
    if wanted != "auto":
        return Choice(wanted, f"rollout.mode={wanted}; {has}, trainer ranks here: {trainer_ranks}")
    if art and devices >= 2 and devices == trainer_ranks:
        raise ConfigError(f"ART's split needs a device for the engine; {has}, all of them the trainer's")
    if devices > trainer_ranks:
        rest = devices - trainer_ranks
        return Choice("split", f"{has}, of which {trainer_ranks} train: {rest} left for the engine")
    if not devices:
        return Choice("colocated", "no CUDA device: all ranks share the CPU")
    if devices == 1 and (art or fits is False):
        why = "by ART's rule" if art else "both models do not fit into it at the same time"
        return Choice("shared", f"one CUDA device, {why}: they take turns")
    return Choice("colocated", f"{has}, a trainer rank on each")


def both_fit(weight_bytes: int, device_bytes: int, mem_fraction: float) -> bool:
    """May a device hold the engine, with its share `mem_fraction`, and a trainer rank beside it? weight_bytes: of the
    model, whole on each of both."""
    return (
        weight_bytes < mem_fraction * device_bytes and weight_bytes < TRAINER_SHARE * (1 - mem_fraction) * device_bytes
    )


def engines_in(mode: Mode, *, devices: int, trainer_ranks: int, tp_size: int, count: int | None = None) -> list[range]:
    """By engine, its ranks, counted through over all engines. Raises `ConfigError` where they have no place.

    Split: as many engines of `tp_size` as the devices that do not train hold, or `count`; on a CPU, where nothing
    limits them, as many as the trainer's ranks would hold. Otherwise one beside each run of `tp_size` trainer ranks.
    """
    if mode != "split":
        return engines(trainer_ranks, tp_size)
    room = devices - trainer_ranks if devices else None
    fitting = (trainer_ranks if room is None else room) // tp_size
    if room is not None and (count or 1) * tp_size > room:
        raise ConfigError(
            f"{count or 1} engine(s) of {tp_size} ranks on the {room} devices that do not train; "
            f"set --rollout-num-gpus-per-engine to {room} or less"
        )
    number = count or max(1, fitting)
    return [range(first, first + tp_size) for first in range(0, number * tp_size, tp_size)]


def first_device(mode: Mode, *, devices: int, trainer_ranks: int) -> int:
    """Number of the device of engine rank 0 among the visible ones."""
    return trainer_ranks if mode == "split" and devices else 0


def device_order(training: Sequence[int], inference: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES under which trainer ranks come first, engine ranks after them, both in the given order."""
    if clash := sorted(set(training) & set(inference)):
        raise ConfigError(f"devices {clash} are given to training and to inference; each can have one task in a split")
    return ",".join(str(device) for device in (*training, *inference))


def engine_first(mode: Mode, *, devices: int) -> bool:
    """Must the engine be up before the trainer's model is built? On a GPU whenever both sit on one: SGLang makes its KV
    cache out of what is free when it starts. On a CPU, where the starts overlap, only to make room (shared)."""
    return mode == "shared" or (mode == "colocated" and devices > 0)
