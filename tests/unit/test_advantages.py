import math

import pytest
import torch

from megatron_sglang.advantages import group_advantages
from megatron_sglang.errors import ConfigError, RewardError

REWARDS_PG = torch.tensor([[0.0, 1.0, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


def test_grpo_divides_by_the_unbiased_std_plus_eps() -> None:
    """By hand: mean .5, squares .25 + .25, std sqrt(.5 / 3); mean .25, squares .5625 + 3 * .0625, std .5."""
    std = math.sqrt(0.5 / 3)
    expected = [[-0.5 / (std + 0.01), 0.5 / (std + 0.01), 0.0, 0.0], [0.75 / 0.51] + 3 * [-0.25 / 0.51]]
    got = group_advantages(REWARDS_PG, eps=0.01)
    torch.testing.assert_close(got.advantages_PG, torch.tensor(expected, dtype=torch.float64))


def test_dr_grpo_only_centres() -> None:
    got = group_advantages(REWARDS_PG, std_normalization=False)
    assert got.advantages_PG.tolist() == [[-0.5, 0.5, 0.0, 0.0], [0.75, -0.25, -0.25, -0.25]]


def test_leave_one_out_compares_each_with_the_mean_of_the_others() -> None:
    got = group_advantages(REWARDS_PG, "leave_one_out", std_normalization=False).advantages_PG
    for p in range(2):
        for g in range(4):
            others = [REWARDS_PG[p, i].item() for i in range(4) if i != g]
            assert got[p, g].item() == pytest.approx(REWARDS_PG[p, g].item() - sum(others) / 3)


def test_equal_rewards_give_exactly_zero_and_are_counted() -> None:
    """0.1 three times has a mean of 0.10000000000000002: rounding over eps would be a small but real push."""
    rewards_PG = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1], [0.7, 0.7, 0.7]], dtype=torch.float64)
    assert (rewards_PG - rewards_PG.mean(1, keepdim=True))[0].abs().max() > 0
    got = group_advantages(rewards_PG, eps=0.0)
    assert got.advantages_PG[0].tolist() == got.advantages_PG[2].tolist() == [0.0, 0.0, 0.0]
    assert got.informative_P.tolist() == [False, True, False]


def test_a_group_of_one_is_refused_instead_of_learning_nothing() -> None:
    with pytest.raises(ConfigError, match="group size 1"):
        group_advantages(torch.ones(3, 1))


def test_a_reward_that_is_no_number_is_named() -> None:
    with pytest.raises(RewardError, match="group 1 of 2, member 0 is nan"):
        group_advantages(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]))
