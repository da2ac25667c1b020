"""Reward functions with the faults of a user's first draft."""

from __future__ import annotations

import math
import time

from megatron_sglang.types import Completion, Prompt


def raises(prompt: Prompt, completion: Completion) -> float:
    return prompt.problem["no such field"]


def hangs(prompt: Prompt, completion: Completion) -> float:
    time.sleep(600)
    return 0.0


def not_a_number(prompt: Prompt, completion: Completion) -> float:
    return math.nan
