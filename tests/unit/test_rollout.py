"""Rollout against an engine that draws from the request's seed alone, as a real one with seeded sampling does."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron_sglang.advantages import group_advantages
from megatron_sglang.buckets import Bucket
from megatron_sglang.errors import EngineError, EngineStaleError, RewardError
from megatron_sglang.metrics import values
from megatron_sglang.rollout import (
    Rollout,
    evaluation_metrics,
    request_seed,
    rewards,
    rollout_metrics,
    to_samples,
)
from megatron_sglang.types import Completion, GenerateRequest, Prompt, RolloutGroup, SamplingParams, Score

STOP = 0
PROMPTS = [Prompt(f"p{i}", (100 + i, 7), "test", {"family": "int" if i % 2 else "str"}) for i in range(4)]


class SeededEngine:
    """Up to `max_new_tokens` ids in 1..9, then the stop token if there is room."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.spoil: dict[int, Completion] = {}

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.requests = list(requests)
        return [self.spoil.get(place) or self._draw(request) for place, request in enumerate(requests)]

    def _draw(self, request: GenerateRequest) -> Completion:
        draw = random.Random(f"{request.sampling.seed} {request.token_ids_T}")
        limit = request.sampling.max_new_tokens
        ids = [draw.randint(1, 9) for _ in range(draw.randint(1, limit))]
        stopped = len(ids) < limit
        ids += [STOP] if stopped else []
        return Completion(tuple(ids), tuple(-draw.random() for _ in ids), "stop" if stopped else "length", 4)

    def begin_update(self, version: int) -> None: ...
    def load(self, bucket: Bucket) -> None: ...
    def commit_update(self, version: int, buckets: int) -> str:
        return ""

    def fail_update(self, reason: str) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


class DigitReward:
    """Share of odd digits in the text."""

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        odd = [sum(int(digit) % 2 for digit in completion.text) / len(completion.text) for _, completion in pairs]
        return [Score(value, value == 1.0) for value in odd]

    def close(self) -> None: ...


class ConstantReward(DigitReward):
    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        return self.scores


def decode(ids: Sequence[int]) -> str:
    return "".join(str(token) for token in ids)


def make_rollout(seed: int = 1, group_size: int = 3) -> Rollout:
    sampling = SamplingParams(max_new_tokens=5, stop_token_ids=(STOP,), temperature=0.9)
    return Rollout(SeededEngine(), DigitReward(), decode, sampling, group_size, seed)


def test_groups_follow_the_prompts_with_all_they_need() -> None:
    rollout = make_rollout()
    groups = rollout.collect(PROMPTS, step=0)
    assert [group.prompt for group in groups] == PROMPTS
    assert all(len(group.completions_G) == 3 for group in groups)
    assert isinstance(rollout.engine, SeededEngine)
    assert [request.token_ids_T for request in rollout.engine.requests] == [
        p.token_ids_T for p in PROMPTS for _ in "abc"
    ]
    assert {request.sampling.temperature for request in rollout.engine.requests} == {0.9}
    reasons = set()
    for group in groups:
        for completion, score in zip(group.completions_G, group.scores_G, strict=True):
            reasons.add(completion.finish_reason)
            stopped = completion.finish_reason == "stop"
            assert completion.text == decode(completion.token_ids_T[:-1] if stopped else completion.token_ids_T)
            assert score.value == sum(int(digit) % 2 for digit in completion.text) / len(completion.text)
            assert completion.weight_version == 4
    assert reasons == {"stop", "length"}


def test_a_rollout_batch_can_be_repeated_whatever_the_order_of_its_prompts() -> None:
    forward = make_rollout().collect(PROMPTS, step=5)
    backward = make_rollout().collect(PROMPTS[::-1], step=5)
    assert forward == backward[::-1]
    assert make_rollout().collect(PROMPTS, step=6) != forward
    assert make_rollout(seed=2).collect(PROMPTS, step=5) != forward


def test_seeds_differ_by_run_step_prompt_and_member_and_are_stable_between_machines() -> None:
    keys = [
        (run, step, prompt, member) for run in (1, 2) for step in "01" for prompt in ("a", "b") for member in (0, 1)
    ]
    seeds = [request_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1234, "0", "int/7", 0) == 383020689
    assert request_seed(1, "1", "1", 0) != request_seed(1, "11", "", 0)


def test_a_prompt_that_comes_twice_in_a_batch_gets_other_samples() -> None:
    rollout = make_rollout()
    rollout.collect([PROMPTS[0], PROMPTS[1], PROMPTS[0]], step=0)
    assert isinstance(rollout.engine, SeededEngine)
    assert len({request.sampling.seed for request in rollout.engine.requests}) == 9


def test_generation_and_scoring_are_timed_apart() -> None:
    names: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        yield
        names.append(name)

    replace(make_rollout(), span=span).collect(PROMPTS, step=0)
    assert names == ["generate", "reward"]


def test_evaluation_draws_once_per_prompt_and_is_the_same_at_every_step() -> None:
    rollout = make_rollout()
    groups, metrics = rollout.evaluate(PROMPTS)
    assert [len(group.scores_G) for group in groups] == [1] * 4
    assert values(metrics) == values(rollout.evaluate(PROMPTS)[1])
    assert set(metrics) == {"eval/pass_rate", "eval/reward", "eval/pass_rate/int", "eval/pass_rate/str"}


def group(name: str, rewards_G: Sequence[float], ids: Sequence[tuple[int, ...]], **problem: str) -> RolloutGroup:
    reasons = ["stop" if one[-1] == STOP else "length" for one in ids]
    completions = [
        Completion(one, (-1.0,) * len(one), reason, 2)  # type: ignore[arg-type]
        for one, reason in zip(ids, reasons, strict=True)
    ]
    scores = tuple(Score(value, value == 1.0) for value in rewards_G)
    return RolloutGroup(Prompt(name, (5, 6), "test", problem), tuple(completions), scores)


GROUPS = (
    group("a", [1.0, 0.25, 0.25], [(1, 0), (2, 3, 4), (1, 0)], family="x"),
    group("b", [0.0, 0.0, 0.0], [(1, 0), (2, 0), (3, 0)]),
)


def test_rollout_metrics_by_hand() -> None:
    assert values(rollout_metrics(GROUPS)) == pytest.approx(
        {
            "rollout/reward": 1.5 / 6,
            "rollout/pass_rate": 1 / 6,
            "rollout/response_length": 13 / 6,
            "rollout/tokens": 13,
            "rollout/truncated": 1 / 6,
            "rollout/informative_groups": 1 / 2,
            "rollout/unique": 5 / 6,
        }
    )


def test_evaluation_metrics_count_a_family_only_by_its_own_problems() -> None:
    got = values(evaluation_metrics(GROUPS))
    assert got == pytest.approx({"eval/pass_rate": 1 / 6, "eval/reward": 0.25, "eval/pass_rate/x": 1 / 3})


def test_samples_carry_ids_logprobs_advantage_and_version_of_their_own_completion() -> None:
    rewards_PG = rewards(GROUPS)
    assert rewards_PG.tolist() == [[1.0, 0.25, 0.25], [0.0, 0.0, 0.0]]
    advantages = group_advantages(rewards_PG, std_normalization=False)
    samples = to_samples(GROUPS, advantages.advantages_PG)
    assert [sample.advantage for sample in samples] == [0.5, -0.25, -0.25, 0.0, 0.0, 0.0]
    assert [sample.response_ids_T for sample in samples[:3]] == [(1, 0), (2, 3, 4), (1, 0)]
    assert [sample.reward for sample in samples[:3]] == [1.0, 0.25, 0.25]
    assert {(sample.prompt_ids_T, sample.weight_version) for sample in samples} == {((5, 6), 2)}
    with pytest.raises(ValueError, match="zip"):
        to_samples(GROUPS, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("spoiled", "error", "message"),
    [
        (Completion((1,), (-1.0,), "abort", 4), EngineError, "'p0' ended by 'abort' after 1 tokens"),
        (Completion((), (), "stop", 4), EngineError, "after 0 tokens; expected 1 to 5"),
        (Completion((1,) * 6, (-1.0,) * 6, "length", 4), EngineError, "after 6 tokens"),
        (Completion((1, 0), (-1.0, -1.0), "stop", 3), EngineStaleError, r"weight versions \[3, 4\]"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_an_error(
    spoiled: Completion, error: type[Exception], message: str
) -> None:
    rollout = make_rollout()
    assert isinstance(rollout.engine, SeededEngine)
    rollout.engine.spoil = {1: spoiled}
    with pytest.raises(error, match=message):
        rollout.collect(PROMPTS, step=0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([Score(0.0, False)] * 2, "2 scores for 3 completions"), ([Score(math.nan, False)] * 3, "of 'p0' is nan")],
)
def test_a_broken_reward_is_an_error(scores: list[Score], message: str) -> None:
    rollout = replace(make_rollout(), reward=ConstantReward(scores))
    with pytest.raises(RewardError, match=message):
        rollout.collect(PROMPTS[:1], step=0)
