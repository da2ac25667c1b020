"""Group-relative advantages: each completion against the others of its own prompt. Torch only.

    baseline        std_normalization   A
    mean            yes                 (r - mean) / (std + eps), std unbiased    GRPO, Shao et al. 2024, 2402.03300
    mean            no                  r - mean                                  Dr. GRPO, Liu et al. 2025, 2503.20783
    leave_one_out   no                  r - mean of the others                    RLOO, Ahmadian et al. 2024, 2402.14740

(numbers: arXiv; leave_one_out is G / (G - 1) times mean, with either normalisation). A group whose rewards are all
equal teaches nothing: its advantages are exactly 0, not rounding noise over eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sglang.errors import ConfigError, RewardError

Baseline = Literal["mean", "leave_one_out"]

ESTIMATORS: dict[str, tuple[Baseline, bool]] = {
    "grpo": ("mean", True),
    "dr_grpo": ("mean", False),
    "rloo": ("leave_one_out", False),
}
"""Name -> baseline and std_normalization of `group_advantages`."""


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """`advantages_PG` [P, G] in the rewards' dtype; `informative_P` [P] bool: the group's rewards differ."""

    advantages_PG: torch.Tensor
    informative_P: torch.Tensor


def group_advantages(
    rewards_PG: torch.Tensor, baseline: Baseline = "mean", std_normalization: bool = True, eps: float = 1e-4
) -> GroupAdvantages:
    """Advantages of rewards [P, G], floating point.

    Raises `ConfigError` for groups of one, which have nothing to compare, and `RewardError` for rewards not finite.
    """
    groups, members = rewards_PG.shape
    if members < 2:
        raise ConfigError(
            f"group size {members} gives no baseline: advantages compare completions of one prompt; set it to 2 or more"
        )
    if not rewards_PG.isfinite().all():
        row, column = (~rewards_PG.isfinite()).nonzero()[0].tolist()
        raise RewardError(
            f"reward of group {row} of {groups}, member {column} is {rewards_PG[row, column].item()}; "
            "a finite number is needed; check the reward function"
        )
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        advantages_PG = advantages_PG * (members / (members - 1))
    if std_normalization:
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + eps)
    informative_P = rewards_PG.amax(dim=1) > rewards_PG.amin(dim=1)
    return GroupAdvantages(torch.where(informative_P[:, None], advantages_PG, 0.0), informative_P)
