"""Questions whose answer is a number, and a calculator to find it.

    prompt         What is 47 times 38, less 9?
    turn 1         calc(47*38-9) <end>      a turn that is a call of the tool
    observation    1777
    turn 2         1777 <end>               any other turn is the answer

`problem["ground_truth"]` is the number. Reward 1 for it, else 0: calling the tool earns nothing by itself.
"""

from __future__ import annotations

import math
from typing import get_args

from megatron_sglang.agents.environment import Observation, Services, Step
from megatron_sglang.agents.tools import CallFormat, ToolError, calculate, find_call
from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.types import Completion, Prompt


class Arithmetic:
    """Ends with the answer. tool: the name a call must use. calls: how a call is written (`tools.py`)."""

    def __init__(self, services: Services, *, tool: str = "calc", calls: CallFormat = "plain") -> None:
        if calls not in get_args(CallFormat):
            raise ConfigError(f"rollout.environment.calls={calls!r}; expected {' or '.join(get_args(CallFormat))}")
        self._tool = tool
        self._calls: CallFormat = calls
        self._wanted = 0.0

    def reset(self, prompt: Prompt) -> Observation:
        truth = prompt.problem.get("ground_truth")
        wanted = _number(str(truth))
        if wanted is None:
            raise RewardError(f"problem {prompt.id!r} has ground_truth={truth!r}; the environment needs a number")
        self._wanted = wanted
        return ""

    async def step(self, turn: Completion) -> Step:
        try:
            call = find_call(turn.text, self._calls, turn.stopped_by)
            if call is None:
                right = _number(turn.text) == self._wanted and turn.finish_reason == "stop"
                return Step(reward=float(right), done=True, passed=right, detail="" if right else "wrong answer")
            if call.name != self._tool:
                raise ToolError(f"no tool {call.name[:20]}")
            return Step(calculate(call.argument) + "\n", detail="no answer", counts={"tool_calls": 1, "tool_errors": 0})
        except ToolError as error:
            return Step(f"error: {error}\n", detail=f"no answer: {error}", counts={"tool_calls": 1, "tool_errors": 1})

    async def close(self) -> None: ...


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
