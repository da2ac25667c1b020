"""How one trajectory grows: the model's turns and the environment's observations, as tokens that are only ever added.

    prompt   | a0 a1 <end> | o0 o1 | a2 a3 | <end> o2 | a4 <end>
    mask     | 1  1  1     | 0  0  | 1  1  | 0     0  | 1  1         1: the policy sampled it
    versions | 3  3  3     | 3  3  | 3  4  | 4     4  | 4  4         its weights; 4 took up an aborted turn
    turns    | 0           |       | 1     |          | 2

What was sampled is never decoded and tokenised again, an observation is tokenised once and by itself, and every request
must begin with all tokens of the one before. An end token is added, masked, after a turn that has none (it ran into its
limit, or ended by a stop text) and is followed by another. Nothing is cut off: a trajectory that has no room left ends
with finish_reason "length".

Seeds follow from (run seed, rollout step, prompt, member, turn, part), so a trajectory is the same whatever runs beside
it; a part is what one request contributes to a turn, more than one only after an abort. Turn 0, part 0 has the seed of
`rollout.Rollout`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sglang import routing
from megatron_sglang.agents.bounded import Bounded
from megatron_sglang.agents.environment import Environment, Limits, Observation, Services
from megatron_sglang.errors import ConfigError, EngineError, RewardError
from megatron_sglang.interfaces import AsyncEngine
from megatron_sglang.rollout import request_seed
from megatron_sglang.stops import Decode, StopMatcher
from megatron_sglang.types import (
    Completion,
    FinishReason,
    GenerateRequest,
    Prompt,
    RoutedExperts,
    SamplingParams,
    Score,
)


@dataclass(slots=True)
class Turn:
    """[start, end) of a turn in its trajectory's tokens."""

    start: int
    end: int
    finish_reason: FinishReason


@dataclass(slots=True)
class Trajectory:
    """One member of a group under way, or done (`finish_reason` set). Grows; JSON by `asdict` and `of`."""

    prompt: Prompt
    step: str
    """Name of the rollout batch that started it; part of its seeds."""
    member: int
    ids: list[int] = field(default_factory=list)
    """All tokens after the prompt, as are the three lists below."""
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """-1 before anything was sampled."""
    turns: list[Turn] = field(default_factory=list)
    """Complete ones."""
    turn_start: int = 0
    """Where the turn under way began."""
    part: int = 0
    """How often that turn was aborted."""
    finish_reason: FinishReason | None = None
    reward: float = 0.0
    passed: bool = False
    detail: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    routed: RoutedExperts | None = None
    """Of its first tokens, the prompt's too: each by the request that processed it first. None: not asked for."""

    @staticmethod
    def of(row: dict[str, Any]) -> Trajectory:
        """Inverse of `dataclasses.asdict` with `routing.json_values`, also after JSON."""
        prompt = row["prompt"] | {"token_ids_T": tuple(row["prompt"]["token_ids_T"])}
        records: dict[str, Any] = {
            "prompt": Prompt(**prompt),
            "turns": [Turn(**turn) for turn in row["turns"]],
            "routed": routing.from_json(row.get("routed")),
        }
        return Trajectory(**(row | records))

    @property
    def session_id(self) -> str:
        """The same for all members of a group, so that one engine serves them: it has their common prompt in its cache,
        and a slow engine delays whole groups instead of one member of every group."""
        key = "\0".join((self.step, self.prompt.id))
        return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

    def seed(self, run_seed: int) -> int:
        """Seed of the next request: of turn 0, part 0 that of `rollout.Rollout`."""
        step = f"{self.step}/{len(self.turns)}/{self.part}" if self.turns or self.part else self.step
        return request_seed(run_seed, step, self.prompt.id, self.member)

    def sampled(self, completion: Completion) -> None:
        """Add what the policy sampled."""
        versions = completion.versions_T or (completion.weight_version,) * len(completion.token_ids_T)
        self._add(completion.token_ids_T, completion.logprobs_T, 1, versions)
        self.routed = routing.joined((self.routed, completion.routed_experts))
        if versions:
            self.versions = [versions[0] if version == -1 else version for version in self.versions]

    def observed(self, ids: Sequence[int]) -> None:
        """Add what the policy is shown; the next turn begins after it."""
        self._add(ids, [0.0] * len(ids), 0, [self.versions[-1] if self.versions else -1] * len(ids))
        self.turn_start = len(self.ids)

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], mask: int, versions: Sequence[int]) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.mask += [mask] * len(ids)
        self.versions += versions
        assert len(self.ids) == len(self.logprobs) == len(self.mask) == len(self.versions)

    def turn(self, span: Turn, decode: Decode, sampling: SamplingParams) -> Completion:
        """A turn as the environment sees it: its text ends before the token or text that ended it."""
        ids_T = tuple(self.ids[span.start : span.end])
        text, stopped_by = _text(ids_T, decode, sampling)
        return Completion(
            token_ids_T=ids_T,
            logprobs_T=tuple(self.logprobs[span.start : span.end]),
            finish_reason=span.finish_reason,
            weight_version=self.versions[span.end - 1],
            text=text,
            stopped_by=stopped_by,
        )

    def completion(self, decode: Decode, sampling: SamplingParams, *, trained: Callable[[int], bool]) -> Completion:
        """The finished trajectory as one completion. trained: may the loss count tokens of this weight version?"""
        assert self.finish_reason is not None, "it is still going on"
        last_turn = self.ids[self.turns[-1].start :]
        last_text, stopped_by = _text(last_turn, decode, sampling)
        ended_by = len(decode(last_turn)) - len(last_text)
        text = decode(self.ids)
        mask_T = tuple(int(m and trained(version)) for m, version in zip(self.mask, self.versions, strict=True))
        last = max(place for place, sampled in enumerate(self.mask) if sampled)
        return Completion(
            token_ids_T=tuple(self.ids),
            logprobs_T=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            weight_version=self.versions[last],
            text=text[: len(text) - ended_by],
            stopped_by=stopped_by,
            loss_mask_T=() if all(mask_T) else mask_T,
            versions_T=() if len(set(self.versions)) == 1 else tuple(self.versions),
            turns=len(self.turns),
            routed_experts=self.routed,
        )

    def score(self) -> Score:
        return Score(self.reward, self.passed, self.detail)


@dataclass(slots=True)
class Agent:
    """Runs trajectories against one engine, in one event loop; `stopping` ends all of them at their next turn."""

    engine: AsyncEngine
    make: Callable[[Services], Environment]
    services: Services
    decode: Decode
    sampling: SamplingParams
    """max_new_tokens is that of a whole trajectory, observations included."""
    limits: Limits
    seed: int
    routing: bool = False
    """Ask for the experts that processed each token."""
    stopping: bool = False
    versions: set[int] = field(default_factory=set)
    """Weight versions of all that was sampled."""

    async def run(self, trajectory: Trajectory) -> None:
        """Take it to its end, or to where it stands when `stopping`.

        Raises `EngineError` for completions that are empty, too long, or aborted by somebody else; `RewardError` for an
        environment that does not answer, or does not close.
        """
        if trajectory.finish_reason is not None:
            return
        environment = Bounded(self.make, self.services, trajectory.prompt, self.limits.step_timeout_s)
        try:
            await self._open(environment, trajectory)
            known: tuple[int, ...] = ()
            while trajectory.finish_reason is None and not self.stopping:
                history = trajectory.prompt.token_ids_T + tuple(trajectory.ids)
                assert history[: len(known)] == known, "a turn must begin with all tokens of the one before"
                span, known = await self._sample(trajectory, history)
                if span is not None:
                    await self._answer(environment, trajectory, span)
        except Exception as error:
            error.add_note(f"in a trajectory of prompt {trajectory.prompt.id!r}, turn {len(trajectory.turns)}")
            raise
        finally:
            await environment.close()

    async def _open(self, environment: Bounded, trajectory: Trajectory) -> None:
        """Begin with the environment's first observation. If the trajectory is resumed, its environment is a new one,
        and is brought to where the old one was by the turns that are complete."""
        first = environment.reset()
        if not trajectory.ids:
            observation = self._encode(first, trajectory)
            if len(observation) >= self.sampling.max_new_tokens:
                raise ConfigError(
                    f"the environment's first observation of prompt {trajectory.prompt.id!r} has {len(observation)} "
                    f"tokens; rollout.max_new_tokens={self.sampling.max_new_tokens} bounds a whole trajectory, raise it"
                )
            trajectory.observed(observation)
        for span in trajectory.turns:
            await environment.step(trajectory.turn(span, self.decode, self.sampling))

    async def _sample(self, trajectory: Trajectory, history: tuple[int, ...]) -> tuple[Turn | None, tuple[int, ...]]:
        """Send one request for what follows `history`. Returns the turn, or None if the request was aborted before its
        end, and the history with what was sampled."""
        done = len(trajectory.ids) - trajectory.turn_start
        budget = self.sampling.max_new_tokens - len(trajectory.ids)
        if self.limits.max_turn_tokens:
            budget = min(budget, self.limits.max_turn_tokens - done)
        if budget < 1:
            raise ConfigError(
                f"a trajectory of prompt {trajectory.prompt.id!r} to be continued has {len(trajectory.ids)} tokens, "
                f"{done} of them in its turn; rollout.max_new_tokens={self.sampling.max_new_tokens} and "
                f"max_turn_tokens={self.limits.max_turn_tokens} leave no room, set them as they were"
            )
        sampling = replace(
            self.sampling,
            seed=trajectory.seed(self.seed),
            max_new_tokens=budget,
            min_new_tokens=min(budget, max(0, self.sampling.min_new_tokens - done)),
        )
        known = 0 if trajectory.routed is None else trajectory.routed.tokens
        request = GenerateRequest(
            history,
            sampling,
            trajectory.session_id,
            stop_from=len(history) - done if done and sampling.stop else None,
            routing_from=known if self.routing else None,
        )
        completion = await self.engine.generate(request)
        length, reason = len(completion.token_ids_T), completion.finish_reason
        if not int(reason != "abort") <= length <= budget or (reason == "abort" and not self.stopping):
            raise EngineError(
                f"completion of prompt {trajectory.prompt.id!r} ended by {reason!r} after {length} tokens; "
                f"expected 1 to {budget}, not aborted; see the engine's log"
            )
        trajectory.sampled(completion)
        self.versions.update(trajectory.versions[len(trajectory.versions) - length :])
        known = history + completion.token_ids_T
        if reason == "abort" and length < budget:
            trajectory.part += 1
            return None, known
        return Turn(trajectory.turn_start, len(trajectory.ids), "length" if reason == "abort" else reason), known

    async def _answer(self, environment: Bounded, trajectory: Trajectory, span: Turn) -> None:
        """Let the environment answer a complete turn, and end the trajectory or open the next turn."""
        step = await environment.step(trajectory.turn(span, self.decode, self.sampling))
        if not math.isfinite(step.reward):
            raise RewardError(
                f"environment {environment.name} gave a turn of prompt {trajectory.prompt.id!r} the reward "
                f"{step.reward}; expected a finite number"
            )
        trajectory.turns.append(span)
        trajectory.part = 0
        # Numbers of numpy or torch, as environments compute them, have no place in a record or a checkpoint.
        trajectory.reward, trajectory.passed, trajectory.detail = (
            float(step.reward),
            bool(step.passed),
            str(step.detail),
        )
        self._count(trajectory, step.counts)
        if step.done or len(trajectory.turns) >= self.limits.max_turns:
            trajectory.finish_reason = span.finish_reason
            return
        stops = self.sampling.stop_token_ids
        end = () if not stops or trajectory.ids[-1] in stops else stops[:1]
        observation = (*end, *self._encode(step.observation, trajectory))
        if len(trajectory.ids) + len(observation) >= self.sampling.max_new_tokens:
            trajectory.finish_reason = "length"
            return
        trajectory.observed(observation)

    def _encode(self, observation: Observation, trajectory: Trajectory) -> tuple[int, ...]:
        ids = self.services.encode(observation) if isinstance(observation, str) else tuple(observation)
        if len(ids) > self.limits.max_observation_tokens:
            self._count(trajectory, {"cut_observations": 1})
        return ids[: self.limits.max_observation_tokens]

    def _count(self, trajectory: Trajectory, counts: Mapping[str, float]) -> None:
        for name, number in counts.items():
            trajectory.counts[name] = trajectory.counts.get(name, 0) + float(number)


def _text(ids: Sequence[int], decode: Decode, sampling: SamplingParams) -> tuple[str, str]:
    """The text of a turn, without the token or the text that ended it; and that text, or an empty one."""
    if ids and ids[-1] in sampling.stop_token_ids:
        return decode(ids[:-1]), ""
    matcher = StopMatcher(sampling.stop, decode)
    if sampling.stop:
        matcher.feed(ids)
    return (decode(ids), "") if matcher.matched is None else (matcher.text, matcher.matched)
