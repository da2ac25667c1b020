"""Prompts in, scored groups out: sample G completions of each prompt, decode them, score them.

Nothing is cut off or dropped on the way: a completion that hit the token limit is scored and counted as such, one that
the engine gave up is an error. Seeds follow from (run seed, rollout step, prompt id, member), so a rollout batch can be
repeated whatever the order of its prompts; evaluation uses the same seeds each time, so two of them differ by the
policy alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from megatron_sglang.errors import EngineError, EngineStaleError, RewardError
from megatron_sglang.interfaces import Engine, Reward
from megatron_sglang.metrics import Mean, Metric, Sum
from megatron_sglang.stops import Decode
from megatron_sglang.types import (
    Completion,
    GenerateRequest,
    Prompt,
    RolloutGroup,
    SamplingParams,
    Score,
    TrainSample,
)


class Source(Protocol):
    """Where prompts come from; see `prompts.source.PromptSource`."""

    @property
    def prompts_per_batch(self) -> int: ...

    def draw(self, count: int) -> tuple[Prompt, ...]: ...


class Sampler(Protocol):
    """What the cycle knows of a rollout: `Rollout` below, or `agents.rollout.AgentRollout`."""

    @property
    def decode(self) -> Decode: ...

    def batch(self, source: Source, step: int) -> tuple[RolloutGroup, ...]:
        """The scored groups of rollout batch `step`, `source.prompts_per_batch` of them."""
        ...

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[tuple[RolloutGroup, ...], dict[str, Metric]]: ...

    def metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
        """Metrics of the last batch, which gave `groups`."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, in JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """Runs on the rank that leads the engine.

    >>> rollout = Rollout(engine, reward, tokenizer.decode, sampling, group_size=8, seed=1234)
    >>> groups = rollout.collect(prompts, step=0)
    """

    engine: Engine
    reward: Reward
    decode: Decode
    """Token ids, stop token excluded, to text."""
    sampling: SamplingParams
    """Of every request but for the seed."""
    group_size: int
    seed: int
    span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Measures the phases "generate" and "reward"; e.g. `RunLog.span`."""
    routing: bool = False
    """Ask for the experts that processed the tokens of a rollout batch, for the trainer to replay."""
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    """Prints a notice."""
    unfinished: list[dict[str, Any]] = field(default_factory=list)
    """Of the checkpoint of a run that over-sampled, as `agents.rollout.AgentRollout.state` writes them: groups whose
    prompts come first, sampled anew. Their tokens would be of older weights, which this run did not ask for."""

    def batch(self, source: Source, step: int) -> tuple[RolloutGroup, ...]:
        """`collect` of the prompts of unfinished groups, and of the next ones of `source`."""
        first = [_prompt_of(group) for group in self.unfinished[: source.prompts_per_batch]]
        missing = source.prompts_per_batch - len(first)
        groups = self.collect((*first, *(source.draw(missing) if missing else ())), step)
        del self.unfinished[: len(first)]
        return groups

    def metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
        """See `rollout_metrics`."""
        return rollout_metrics(groups)

    def state(self) -> dict[str, Any]:
        """Nothing is carried from one batch to the next but what a checkpoint had."""
        return {"groups": list(self.unfinished)} if self.unfinished else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the prompts of unfinished groups: they have left the data set's order, and would be trained on in
        another epoch only."""
        found = state.get("groups", [])
        if found and found != self.unfinished:
            self.say(
                f"the checkpoint has {len(found)} unfinished groups, which a run with rollout.over_sampling=1.0 does "
                "not continue; their prompts come first, sampled anew"
            )
        self.unfinished[:] = found

    def collect(self, prompts: Sequence[Prompt], step: int) -> tuple[RolloutGroup, ...]:
        """`group_size` scored completions of each prompt, in the prompts' order.

        Raises `EngineError` for aborted, missing or overlong completions, `EngineStaleError` for completions of
        different weight versions, `RewardError` for missing or non-finite rewards.
        """
        return self._sample(prompts, str(step), self.group_size)

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[tuple[RolloutGroup, ...], dict[str, Metric]]:
        """One completion of each prompt; eval/{pass_rate,reward}, overall and per `problem["family"]`."""
        groups = self._sample(prompts, "eval", 1)
        return groups, evaluation_metrics(groups)

    def _sample(self, prompts: Sequence[Prompt], step: str, members: int) -> tuple[RolloutGroup, ...]:
        """`members` scored completions of each prompt. step: the part of their seeds that tells batches apart."""
        seen: Counter[str] = Counter()
        routing_from = 0 if self.routing and step != "eval" else None
        requests: list[GenerateRequest] = []
        for prompt in prompts:
            # A prompt that comes twice in one batch must not give the same samples twice.
            first = seen[prompt.id] * members
            seen[prompt.id] += 1
            for member in range(first, first + members):
                sampling = replace(self.sampling, seed=request_seed(self.seed, step, prompt.id, member))
                requests.append(GenerateRequest(prompt.token_ids_T, sampling, routing_from=routing_from))

        with self.span("generate"):
            completions = [self._with_text(completion) for completion in self.engine.generate(requests)]
        asked = [prompt for prompt in prompts for _ in range(members)]
        self._check_completions(asked, completions)
        with self.span("reward"):
            scores = self.reward.score(list(zip(asked, completions, strict=True)))
        check_scores(asked, scores)

        starts = range(0, len(asked), members)
        return tuple(
            RolloutGroup(prompt, tuple(completions[start : start + members]), tuple(scores[start : start + members]))
            for prompt, start in zip(prompts, starts, strict=True)
        )

    def _with_text(self, completion: Completion) -> Completion:
        ids_T = completion.token_ids_T
        stopped = bool(ids_T) and ids_T[-1] in self.sampling.stop_token_ids
        return replace(completion, text=self.decode(ids_T[:-1] if stopped else ids_T))

    def _check_completions(self, asked: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        if len(completions) != len(asked):
            raise EngineError(f"engine returned {len(completions)} completions for {len(asked)} requests")
        limit = self.sampling.max_new_tokens
        for prompt, completion in zip(asked, completions, strict=True):
            length = len(completion.token_ids_T)
            if completion.finish_reason == "abort" or not 0 < length <= limit:
                raise EngineError(
                    f"completion of prompt {prompt.id!r} ended by {completion.finish_reason!r} after {length} tokens; "
                    f"expected 1 to {limit}, not aborted; see the engine's log"
                )
        versions = {completion.weight_version for completion in completions}
        if len(versions) > 1:
            raise EngineStaleError(
                f"one rollout batch was sampled with weight versions {sorted(versions)}; expected a single one; "
                "weights must not be published while the engine generates"
            )


def _prompt_of(group: dict[str, Any]) -> Prompt:
    prompt = group["trajectories"][0]["prompt"]
    return Prompt(**prompt | {"token_ids_T": tuple(prompt["token_ids_T"])})


def request_seed(run_seed: int, step: str, prompt_id: str, member: int) -> int:
    """31-bit seed of one request, the same on every machine and Python."""
    key = "\0".join((str(run_seed), step, prompt_id, str(member)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) >> 1


def rewards(groups: Sequence[RolloutGroup]) -> torch.Tensor:
    """Rewards [P, G] float64 of groups of equal size."""
    return torch.tensor([[score.value for score in group.scores_G] for group in groups], dtype=torch.float64)


def to_samples(groups: Sequence[RolloutGroup], advantages_PG: torch.Tensor) -> list[TrainSample]:
    """One sample per completion: groups in order, members in order."""
    return [
        TrainSample(
            prompt_ids_T=group.prompt.token_ids_T,
            response_ids_T=completion.token_ids_T,
            rollout_logprobs_T=completion.logprobs_T,
            advantage=advantage,
            reward=score.value,
            weight_version=completion.weight_version,
            loss_mask_T=completion.loss_mask_T,
            routed_experts=completion.routed_experts,
            oldest_version=min(completion.trained_versions, default=None),
        )
        for group, advantages_G in zip(groups, advantages_PG.tolist(), strict=True)
        for completion, score, advantage in zip(group.completions_G, group.scores_G, advantages_G, strict=True)
    ]


def sampled_tokens(completion: Completion) -> int:
    """Tokens that the policy sampled, and the loss counts."""
    return sum(completion.loss_mask_T) if completion.loss_mask_T else len(completion.token_ids_T)


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """rollout/*: means over completions; of informative_groups over groups; of unique, distinct completions of a prompt
    over its completions. Tokens are those the policy sampled."""
    completions = [completion for group in groups for completion in group.completions_G]
    scores = [score for group in groups for score in group.scores_G]
    distinct = sum(len({completion.token_ids_T for completion in group.completions_G}) for group in groups)
    tokens = sum(map(sampled_tokens, completions))
    informative = sum(len({score.value for score in group.scores_G}) > 1 for group in groups)
    return {
        "rollout/reward": Mean(math.fsum(score.value for score in scores), len(scores)),
        "rollout/pass_rate": Mean(sum(score.passed for score in scores), len(scores)),
        "rollout/response_length": Mean(tokens, len(completions)),
        "rollout/tokens": Sum(float(tokens)),
        "rollout/truncated": Mean(sum(item.finish_reason == "length" for item in completions), len(completions)),
        "rollout/informative_groups": Mean(informative, len(groups)),
        "rollout/unique": Mean(distinct, len(completions)),
    }


def evaluation_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """eval/{pass_rate,reward}, and eval/pass_rate/<family> where problems name one."""
    scores = [score for group in groups for score in group.scores_G]
    metrics: dict[str, Metric] = {
        "eval/pass_rate": Mean(sum(score.passed for score in scores), len(scores)),
        "eval/reward": Mean(math.fsum(score.value for score in scores), len(scores)),
    }
    families = sorted({str(group.prompt.problem["family"]) for group in groups if "family" in group.prompt.problem})
    for family in families:
        members = [group for group in groups if str(group.prompt.problem.get("family")) == family]
        passed = [score.passed for group in members for score in group.scores_G]
        metrics[f"eval/pass_rate/{family}"] = Mean(sum(passed), len(passed))
    return metrics


def check_scores(asked: Sequence[Prompt], scores: Sequence[Score]) -> None:
    """`RewardError` unless there is one finite score for each."""
    if len(scores) != len(asked):
        raise RewardError(f"reward function returned {len(scores)} scores for {len(asked)} completions")
    for prompt, score in zip(asked, scores, strict=True):
        if not math.isfinite(score.value):
            raise RewardError(f"reward of a completion of {prompt.id!r} is {score.value}; expected a finite number")
