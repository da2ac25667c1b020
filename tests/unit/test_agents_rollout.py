"""Batches of trajectories: over-sampling, stragglers and groups without a signal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest
import torch
from scripted_engine import Both, Digits, ScriptedEngine, Talk, VirtualLoop, make_rollout, prompts, rollouts, source

from megatron_sglang.agents import AgentRollout
from megatron_sglang.agents.environment import Environments, Limits, Step
from megatron_sglang.agents.fim_repair import FimRepair
from megatron_sglang.agents.scoring import Scorer
from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.metrics import values
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.rollout import Rollout, to_samples
from megatron_sglang.types import Completion, Prompt, RolloutGroup, Score


class Timed(VirtualLoop):
    """Leaves its last time behind."""

    seconds = 0.0

    def close(self) -> None:
        Timed.seconds = self.now
        super().close()


def batch_seconds(engine: ScriptedEngine, over: float, stragglers: str, step: int = 0) -> float:
    rollout = make_rollout(engine, over_sampling=over, stragglers=stragglers, loop_factory=Timed)
    rollout.batch(source(40, 8), step)
    return Timed.seconds


@pytest.mark.parametrize("stragglers", ["abort", "resume"])
def test_one_slow_request_hardly_delays_an_over_sampled_batch(stragglers: str) -> None:
    """The tenfold pace of one trajectory is the batch's where everything is awaited, and nobody's where it is not."""
    usual = median(batch_seconds(ScriptedEngine(), 1.0, "abort", step) for step in range(5))
    slow = ScriptedEngine()
    slow.slow = lambda request: 10.0 if request.token_ids_T[0] == 103 else 1.0
    assert batch_seconds(slow, 1.0, "abort") > 3 * usual
    assert batch_seconds(slow, 1.25, stragglers) <= 1.3 * usual
    assert slow.aborts >= 1


@pytest.mark.parametrize("stragglers", ["abort", "resume"])
def test_one_slow_engine_of_four_hardly_delays_an_over_sampled_batch(stragglers: str) -> None:
    """It has a quarter of the groups, whole ones: with 4/3 of what is wanted the others are enough. Had it a member of
    every group, no over-sampling would help."""
    usual = median(batch_seconds(ScriptedEngine(), 1.0, "abort", step) for step in range(5))
    slow, homes = ScriptedEngine(), dict[str, int]()
    slow.slow = lambda request: 1.0 if homes.setdefault(request.session_id, len(homes)) % 4 else 10.0
    assert batch_seconds(slow, 1.0, "abort") > 3 * usual
    homes.clear()
    assert batch_seconds(slow, 1.375, stragglers) <= 1.3 * usual


def test_stragglers_are_dropped_or_come_first_in_the_next_batch_with_the_tokens_they_have() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 and engine.version == 1 else 1.0
    for stragglers, first in (("abort", "p5"), ("resume", "p0")):
        engine.version = 1
        rollout = make_rollout(engine, over_sampling=1.25, stragglers=stragglers)
        prompts_left = source(40, 4)
        groups = rollout.batch(prompts_left, 0)
        assert [group.prompt.id for group in groups] == ["p1", "p2", "p3", "p4"]
        assert rollout.metrics(groups)["rollout/aborted"].value() >= 1
        standing = {one.member: list(one.ids) for group in rollout.buffer for one in group.trajectories}
        assert bool(standing) == (stragglers == "resume")
        engine.version = 2
        groups = rollout.batch(prompts_left, 1)
        assert groups[0].prompt.id == first
        found = values(rollout.metrics(groups))
        assert found["rollout/resumed"] == len(standing)
        if standing:
            for member, done in enumerate(groups[0].completions_G):
                assert list(done.token_ids_T[: len(standing[member])]) == standing[member]
            assert {1, 2} == {v for done in groups[0].completions_G for v in done.versions_T or (done.weight_version,)}
            assert found["rollout/tokens_lag_1"] > 0
            assert found["rollout/tokens_lag_0"] + found["rollout/tokens_lag_1"] == found["rollout/tokens"]


def test_no_more_groups_are_started_than_are_asked_for() -> None:
    """In binary 50 times 1.1 is a little above 55; a data set of 55 would be too small for it."""
    rollout = make_rollout(ScriptedEngine(), over_sampling=1.1)
    groups = rollout.batch(source(55, 50), 0)
    assert values(rollout.metrics(groups))["rollout/started_groups"] == 55


def test_old_tokens_are_masked_on_demand() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 and engine.version == 1 else 1.0
    rollout = make_rollout(engine, over_sampling=1.25, stragglers="resume_masked")
    prompts_left = source(40, 4)
    rollout.batch(prompts_left, 0)
    old = {one.member: one.mask.count(1) for one in rollout.buffer[0].trajectories}
    assert max(old.values()) > 0
    engine.version = 2
    groups = rollout.batch(prompts_left, 1)
    assert groups[0].prompt.id == "p0"
    for done in groups[0].completions_G:
        if done.versions_T:
            kept = [v for v, m in zip(done.versions_T, done.loss_mask_T, strict=True) if m]
            assert set(kept) == {2}
    assert any(done.versions_T for done in groups[0].completions_G)
    samples = to_samples(groups, torch.zeros(4, 3))
    assert all(sample.is_of(2) for sample in samples), "nothing that the loss counts is old"
    assert not any(sample.is_of(3) for sample in samples if any(sample.loss_mask_T or (1,)))


def test_a_sample_knows_the_oldest_weights_that_the_loss_will_see() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 4.0 if request.token_ids_T[0] == 100 and engine.version == 1 else 1.0
    rollout = make_rollout(engine, over_sampling=1.25, stragglers="resume")
    prompts_left = source(40, 4)
    assert all(one.is_of(1) for one in to_samples(rollout.batch(prompts_left, 0), torch.zeros(4, 3)))
    engine.version = 2
    rollout.over_sampling = 1.0
    samples = to_samples(rollout.batch(prompts_left, 1), torch.zeros(4, 3))
    assert [sample.is_of(1) for sample in samples] == [True] * 12
    assert [sample.is_of(2) for sample in samples] == [False] * 3 + [True] * 9
    assert {sample.weight_version for sample in samples[:3]} == {1, 2}, "the last token alone does not tell"


class Alike(Talk):
    """Prompts of even numbers give every member the same reward."""

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self.even = prompt.token_ids_T[0] % 2 == 0
        return ()

    async def step(self, turn: Completion) -> Step:
        return Step(reward=1.0 if self.even else sum(turn.token_ids_T) / 10, done=True)


def test_groups_without_a_signal_are_replaced() -> None:
    for over, drawn in ((1.0, 8), (1.5, 8)):
        rollout = make_rollout(ScriptedEngine(), kind=Alike, dynamic_sampling=True, over_sampling=over)
        groups = rollout.batch(source(), 0)
        assert [group.prompt.id for group in groups] == ["p1", "p3", "p5", "p7"]
        found = values(rollout.metrics(groups))
        assert found["rollout/informative_groups"] == 1.0
        assert (found["rollout/started_groups"], found["rollout/dropped_groups"]) == (drawn, 4)


def few() -> PromptSource:
    """The third prompt alone has a signal with `Alike`."""
    return PromptSource([one for one in prompts(60) if one.token_ids_T[0] % 2 == 0 or one.id == "p3"], 4, shuffle=False)


def test_without_enough_signal_a_batch_is_filled_up_and_says_so_and_without_any_it_is_an_error() -> None:
    said: list[str] = []
    rollout = make_rollout(ScriptedEngine(), kind=Alike, dynamic_sampling=True, say=said.append)
    groups = rollout.batch(few(), 0)
    assert len(groups) == 4
    assert "p3" in [group.prompt.id for group in groups]
    assert said == ["dynamic sampling: 31 of 32 groups had equal rewards; 3 of them fill the batch of 4"]
    none = PromptSource([one for one in prompts(80) if one.token_ids_T[0] % 2 == 0], 4, shuffle=False)
    with pytest.raises(RewardError, match="32 of 32 groups had equal rewards, so nothing can be learned"):
        make_rollout(ScriptedEngine(), kind=Alike, dynamic_sampling=True).batch(none, 0)


def paced(pace: float) -> ScriptedEngine:
    """With pace 0 all groups that are under way are complete together, otherwise one by one."""
    engine = ScriptedEngine()
    engine.slow = lambda request: pace * (1 + request.token_ids_T[0] % 100 / 7)
    return engine


def test_replacements_at_an_epochs_end_do_not_depend_on_how_many_groups_are_complete_together() -> None:
    """Of six prompts five are drawn at first; a draw of three would pass the sixth over, three draws of one do not."""
    found: list[Any] = []
    for pace in (0.0, 1.0):
        left = source(6, 5)
        groups = make_rollout(paced(pace), kind=Alike, dynamic_sampling=True).batch(left, 0)
        found.append((groups, left.state()))
    assert found[0] == found[1]
    assert [group.prompt.id for group in found[0][0]] == ["p1", "p3", "p5", "p1", "p3"]


def test_the_limit_and_what_fills_a_batch_do_not_depend_on_how_many_groups_are_complete_together() -> None:
    """Three of four are replaced again and again; draws of three would end at 31 groups, below the limit of 32."""
    found: list[Any] = []
    for pace in (0.0, 1.0):
        said: list[str] = []
        left = few()
        rollout = make_rollout(paced(pace), kind=Alike, dynamic_sampling=True, say=said.append)
        found.append((rollout.batch(left, 0), left.state(), said))
    assert found[0] == found[1]
    assert found[0][2] == ["dynamic sampling: 31 of 32 groups had equal rewards; 3 of them fill the batch of 4"]


def test_a_prompt_that_is_drawn_again_in_one_batch_gets_other_samples() -> None:
    """Refilling may cross epochs."""
    engine = ScriptedEngine()
    rollout = make_rollout(engine, kind=Alike, dynamic_sampling=True)
    rollout.batch(source(6, 4), 0)
    asked = [request.sampling.seed for request, _ in engine.asked]
    assert len(asked) > 18
    assert len(set(asked)) == len(asked)


def test_one_turn_is_what_the_plain_rollout_gives() -> None:
    """Over-sampling must not change what a sample is: ids, logprobs, seeds, texts, scores are those of `Rollout`."""
    plain = rollouts(Both())
    assert isinstance(plain, Rollout)
    expected = plain.batch(source(), 4)
    for changes in ({"environment": {"name": "single"}}, {"dynamic_sampling": True}, {"over_sampling": 1.001}):
        agent = rollouts(Both(), **changes)
        assert isinstance(agent, AgentRollout)
        groups = agent.batch(source(), 4)
        shared = {group.prompt.id: group for group in expected}
        assert all(group == shared[group.prompt.id] for group in groups if group.prompt.id in shared)
        one, other = plain.evaluate(prompts(3)), agent.evaluate(prompts(3))
        assert one[0] == other[0]
        assert values(one[1]).items() <= values(other[1]).items()


def test_the_verifier_is_asked_for_several_at_a_time_and_never_twice_at_once() -> None:
    agent = rollouts(Both(), environment={"name": "single"})
    assert isinstance(agent.reward, Digits)
    agent.batch(source(40, 16), 0)
    assert sum(agent.reward.calls) == 48
    assert len(agent.reward.calls) < 48


class Slow(Digits):
    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        time.sleep(0.6)
        return super().score(pairs)


class Stuck(FimRepair):
    """Asks the verifier, and then nobody."""

    async def step(self, turn: Completion) -> Step:
        await self._services.score(self._prompt, turn)
        await asyncio.sleep(60)
        return Step()


def test_the_wait_for_the_verifier_is_not_the_environments() -> None:
    """Endless loops in one batch would otherwise end the run: each has its own deadline, and all stand in a row."""
    agent = rollouts(Both(), environment={"name": "single", "step_timeout_s": 0.3})
    assert isinstance(agent, AgentRollout)
    agent.reward = Slow()
    assert len(agent.batch(source(), 0)) == 4
    agent.environments = Environments("stuck", agent.environments.limits, Stuck)
    with pytest.raises(RewardError, match=r"Stuck did not answer a turn of prompt 'p.' within 0\.3 s"):
        agent.batch(source(), 1)


class Failing(Digits):
    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        raise RewardError("no verifier here")


def test_a_verifier_that_fails_ends_the_batch() -> None:
    agent = rollouts(Both(), environment={"name": "single"})
    assert isinstance(agent, AgentRollout)
    agent.reward = Failing()
    with pytest.raises(RewardError, match="no verifier here"):
        agent.batch(source(), 0)


def test_whoever_was_scored_together_with_what_failed_says_why() -> None:
    """All of them fail in the same moment, and the run ends with the error of any one."""
    scorer = Scorer(Failing())

    async def failures() -> list[BaseException | Score]:
        jobs = [scorer(prompt, Completion((1,), (0.0,), "stop", 1)) for prompt in prompts(4)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = asyncio.run(failures())
    assert all(isinstance(error, RewardError) and "no verifier here" in str(error) for error in found), found


def test_more_than_the_data_set_has_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"6 prompts are wanted at once, the data set has 5; lower rollout\.prompts"):
        make_rollout(ScriptedEngine(), over_sampling=1.5).batch(source(5, 4), 0)


def test_evaluation_is_the_same_each_time_and_awaits_everything() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 20.0 if request.token_ids_T[0] == 100 else 1.0
    rollout = make_rollout(engine, over_sampling=2.0, stragglers="resume")
    groups, found = rollout.evaluate(prompts(5))
    assert [len(group.scores_G) for group in groups] == [1] * 5
    assert values(found) == values(rollout.evaluate(prompts(5))[1])
    assert {"eval/pass_rate", "eval/turns", "eval/steps", "eval/pass_rate/x"} <= found.keys()
    assert rollout.buffer == []


def test_evaluation_lets_environments_close() -> None:
    closed: list[int] = []

    class Closing(Talk):
        async def close(self) -> None:
            await asyncio.sleep(5.0)
            closed.append(1)

    make_rollout(ScriptedEngine(), kind=Closing).evaluate(prompts(5))
    assert sum(closed) == 5


def test_environments_of_a_run_are_made_once_for_each_trajectory() -> None:
    made: list[int] = []

    def make(services: Any) -> Talk:
        made.append(1)
        return Talk(services)

    rollout = make_rollout(ScriptedEngine(), environments=Environments("talk", Limits(), make))
    groups: tuple[RolloutGroup, ...] = rollout.batch(source(), 0)
    assert len(made) == sum(len(group.completions_G) for group in groups) == 12
    assert asyncio.get_event_loop_policy() is not None
