"""Which rank is what: Megatron's order of parallel dimensions, and the engines beside them. Pure arithmetic.

Megatron numbers ranks tp first, then cp, dp, pp. Expert layers cut the same ranks of a pipeline stage anew: expert
tensor parallelism (1 here) first, then ep, then expert data parallelism.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

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
    """By engine, the trainer ranks that it sits beside: runs of `tp_size` out of the `ranks` of the leader's node."""
    if ranks % tp_size:
        divisors = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        raise ConfigError(
            f"engine.tp_size={tp_size} does not divide the {ranks} trainer ranks of this node; "
            f"set --rollout-num-gpus-per-engine to {' or '.join(divisors)}"
        )
    return [range(first, first + tp_size) for first in range(0, ranks, tp_size)]
