"""A learning rate that is given with a batch instead of following Megatron's schedule."""

from __future__ import annotations

from typing import Any

import torch


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """For the next step only: Megatron's scheduler sets its own after each.

    `max_lr` of the parameter groups stays: a checkpoint finds its groups again by it.
    """
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
