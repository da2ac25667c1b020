"""What a checkpoint keeps of rollouts under way, and what a run makes of it that goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_engine import Both, ScriptedEngine, Talk, make_rollout, rollouts, source

from megatron_sglang.agents.environment import Step
from megatron_sglang.errors import DataError, EngineError
from megatron_sglang.rollout import Rollout
from megatron_sglang.trace import RunLog
from megatron_sglang.types import Completion, RolloutGroup


def test_what_stands_survives_a_checkpoint_and_a_failed_batch() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 and engine.version == 1 else 1.0
    first = make_rollout(engine, over_sampling=1.25, stragglers="resume")
    prompts_left = source(40, 4)
    first.batch(prompts_left, 0)
    state, place = json.loads(json.dumps(first.state())), prompts_left.state()
    engine.version = 2
    engine.spoil = lambda one: Completion((), (), "stop", 2)
    with pytest.raises(EngineError):
        first.batch(prompts_left, 1)
    engine.spoil = lambda one: one
    assert json.loads(json.dumps(first.state())) == state
    prompts_left.restore(place)
    later = make_rollout(engine, over_sampling=1.25, stragglers="resume")
    later.restore(state)
    again = source(40, 4)
    again.restore(place)
    assert later.batch(again, 1) == first.batch(prompts_left, 1)


class Numpy(Talk):
    """Computes with numpy, whose comparison is no bool."""

    async def step(self, turn: Completion) -> Step:
        step = await super().step(turn)
        found: Any = np.float64(step.reward)
        return replace(step, reward=found, passed=found >= 0.5, counts={"steps": np.int64(1)})


def test_what_an_environment_computes_with_numpy_goes_into_records_and_checkpoints(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 else 1.0
    rollout = make_rollout(engine, kind=Numpy, over_sampling=1.5, stragglers="resume")
    groups = rollout.batch(source(40, 4), 0)
    assert any(one.turns for group in rollout.buffer for one in group.trajectories)
    state = json.loads(json.dumps(rollout.state()))
    with RunLog(tmp_path, echo=lambda line: None) as log:
        log.rollouts(0, groups)
    later = make_rollout(engine, over_sampling=1.5, stragglers="resume")
    later.restore(state)
    assert later.buffer == rollout.buffer


def test_unfinished_groups_of_another_size_are_refused() -> None:
    """They would come first in the next batch, whose groups must have one size."""
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 else 1.0
    first = make_rollout(engine, over_sampling=1.25, stragglers="resume")
    first.batch(source(40, 4), 0)
    assert first.buffer
    later = make_rollout(engine, over_sampling=1.25, stragglers="resume", group_size=2)
    with pytest.raises(DataError, match=r"unfinished groups of 3 completions.*samples_per_prompt=2; resume with 3"):
        later.restore(first.state())


@pytest.mark.parametrize("left", [2, 6])
def test_a_run_without_over_sampling_samples_the_prompts_of_unfinished_groups_anew(
    left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint has taken them from the data set's order: without that they would be lost to this epoch."""
    engine = Both()
    engine.slow = lambda request: 40.0 if request.token_ids_T[0] < 100 + left else 1.0
    before, order = make_rollout(engine, over_sampling=1 + left / 4, stragglers="resume"), source(40, 4)
    before.batch(order, 0)
    state = json.loads(json.dumps(before.state()))
    assert [row["trajectories"][0]["prompt"]["id"] for row in state["groups"]] == [f"p{n}" for n in range(left)]

    plain = rollouts(engine)
    assert isinstance(plain, Rollout)
    plain.restore(state)
    plain.restore(state)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"the checkpoint has {left} unfinished groups"
    ]
    found: list[str] = []
    groups: tuple[RolloutGroup, ...] = ()
    while plain.state():
        place, begun = order.state(), json.loads(json.dumps(plain.state()))
        groups = plain.batch(order, 1)
        order.restore(place)
        plain.restore(begun)  # as after a batch that failed
        assert plain.batch(order, 1) == groups
        found += [group.prompt.id for group in groups]
    assert found == [f"p{n}" for n in (*range(left), *range(left + 4, 40))][: len(found)]
    assert len(found) == 4 * math.ceil(left / 4)
    assert all(one.weight_version == engine.version for group in groups for one in group.completions_G)
