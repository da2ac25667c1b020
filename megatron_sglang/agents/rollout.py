"""Scored groups of multi-turn trajectories: all of a rollout batch at the same time, on one event loop.

    over_sampling 1.25   five groups are started for four wanted; the first four to be complete are kept, and the rest
                         is stopped: dropped ("abort"), or continued in the next batch ("resume"), where it comes first
    dynamic_sampling     groups whose rewards are all equal are dropped; others are drawn until P have a signal

A resumed trajectory keeps its tokens, their logprobs and their weight versions, and grows under the new version. Its
old tokens are off-policy: "resume" leaves them to the loss, where `algo.tis` corrects them; "resume_masked" takes them
out of it.

With over_sampling 1.0 a batch depends on nothing but its seeds, whatever finishes first, with dynamic sampling too: it
is the first P informative groups in the order of the prompts, and what it leaves of the prompts is the same as well.
Above 1.0 it depends on timing, by its nature.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_sglang import routing
from megatron_sglang.agents.environment import Environments, Services
from megatron_sglang.agents.loop import Agent, Trajectory
from megatron_sglang.agents.scoring import Scorer
from megatron_sglang.errors import DataError, EngineError, EngineStaleError, RewardError
from megatron_sglang.interfaces import AsyncEngine, Reward
from megatron_sglang.metrics import Mean, Metric, Sum
from megatron_sglang.rollout import Source, evaluation_metrics, rollout_metrics
from megatron_sglang.stops import Decode
from megatron_sglang.types import Prompt, RolloutGroup, SamplingParams

Stragglers = Literal["abort", "resume", "resume_masked"]

MAX_DRAWS = 8
"""Dynamic sampling draws at most this many times as many prompts as a batch has."""
ABORT_AGAIN_S = 1.0
"""A request that was on its way when the engine was told to abort is found by the next call."""


@dataclass(slots=True)
class Group:
    """The trajectories of one prompt. If the group was stopped, each stands where it was then."""

    trajectories: list[Trajectory]

    @property
    def prompt(self) -> Prompt:
        return self.trajectories[0].prompt

    @property
    def complete(self) -> bool:
        return all(one.finish_reason is not None for one in self.trajectories)

    @property
    def informative(self) -> bool:
        return len({one.reward for one in self.trajectories}) > 1


@dataclass(slots=True)
class AgentRollout:
    """What `rollout.Rollout` is for one turn; runs on the rank that leads the engine.

    >>> rollout = AgentRollout(engine.client, reward, Environments.of({"name": "fim_repair"}), ...)
    >>> groups = rollout.batch(source, step=0)
    """

    connect: Callable[[], AbstractAsyncContextManager[AsyncEngine]]
    """A client of the engine for the event loop that enters it."""
    reward: Reward
    environments: Environments
    decode: Decode
    """Token ids to text."""
    encode: Callable[[str], tuple[int, ...]]
    """Plain text to token ids, see `Services.encode`."""
    sampling: SamplingParams
    """Of every turn but for seed and limit; max_new_tokens bounds a whole trajectory."""
    group_size: int
    seed: int
    over_sampling: float = 1.0
    stragglers: Stragglers = "abort"
    dynamic_sampling: bool = False
    routing: bool = False
    """Ask for the experts that processed the tokens of a rollout batch, for the trainer to replay."""
    span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Measures the phase "generate", in which rewards are computed too."""
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    """Prints a notice."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    buffer: list[Group] = field(default_factory=list)
    """Groups to be continued, oldest first."""
    _counted: dict[str, Metric] = field(init=False, default_factory=dict)
    """Of the last batch, see `_counters`."""

    def batch(self, source: Source, step: int) -> tuple[RolloutGroup, ...]:
        """`source.prompts_per_batch` complete groups, oldest first, then in the order of the prompts.

        Raises what `Rollout.collect` raises, and `RewardError` where dynamic sampling finds no group with a signal.
        """
        with self.span("generate"):
            return asyncio.run(self._batch(source, str(step)), loop_factory=self.loop_factory)

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[tuple[RolloutGroup, ...], dict[str, Metric]]:
        """One trajectory of each prompt; eval/* as `rollout.evaluation_metrics`, eval/turns, and what is counted."""
        with self.span("generate"):
            groups = asyncio.run(self._all(prompts), loop_factory=self.loop_factory)
        trajectories = [one for group in groups for one in group.trajectories]
        finished = self._finished(groups, None)
        found = {f"eval/{name}": metric for name, metric in _of_trajectories(trajectories).items()}
        return finished, evaluation_metrics(finished) | found

    def metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
        """Metrics of the last batch, which gave `groups`."""
        return rollout_metrics(groups) | self._counted

    def state(self) -> dict[str, Any]:
        """The groups that are to be continued, in JSON values, for a checkpoint."""
        return {"groups": [asdict(group, dict_factory=routing.json_values) for group in self.buffer]}

    def restore(self, state: dict[str, Any]) -> None:
        """`DataError` for groups of another size than this run's, with which they would share a batch."""
        rows = state.get("groups", [])
        groups = [Group([_restored(one, self.routing) for one in row["trajectories"]]) for row in rows]
        for size in {len(group.trajectories) for group in groups} - {self.group_size}:
            raise DataError(
                f"the checkpoint has unfinished groups of {size} completions, this run has "
                f"rollout.samples_per_prompt={self.group_size}; resume with {size}"
            )
        self.buffer = groups

    # ---- in the event loop ----

    async def _all(self, prompts: Sequence[Prompt]) -> list[Group]:
        groups = list(_started(prompts, "eval", 1, Counter()))
        async with self._agent(routing=False) as agent, _Running(agent) as running:
            running.start(groups)
            while running.groups:
                await running.completed()
            await running.closed()
        return groups

    async def _batch(self, source: Source, step: str) -> tuple[RolloutGroup, ...]:
        """Start more groups than are wanted, keep the first that are complete, stop the others (module's docstring)."""
        wanted = source.prompts_per_batch
        seen: Counter[str] = Counter()
        before = self.state()
        resumed, self.buffer = self.buffer, []

        def draw(count: int) -> list[Group]:
            return list(_started(source.draw(count), step, self.group_size, seen)) if count > 0 else []

        # 50 x 1.1 is 55.00000000000001.
        groups = resumed + draw(math.ceil(round(wanted * self.over_sampling, 6)) - len(resumed))
        kept: list[Group] = []
        dropped: list[Group] = []
        try:
            async with self._agent(routing=self.routing) as agent, _Running(agent) as running:
                running.start(groups)
                while running.groups and len(kept) < wanted:
                    for group in await running.completed():
                        (dropped if self.dynamic_sampling and not group.informative else kept).append(group)
                    # One prompt at a time: what a draw of several gives at an epoch's end, and whether it is within the
                    # limit, would depend on how many groups were complete together.
                    while len(kept) + len(running.groups) < wanted and len(groups) < MAX_DRAWS * wanted:
                        groups += (more := draw(1))
                        running.start(more)
                aborted = await running.stop()
        except BaseException:
            self.restore(before)  # resumed trajectories have grown since
            raise
        order = {id(group): place for place, group in enumerate(groups)}
        for ended in (kept, dropped):
            ended.sort(key=lambda group: order[id(group)])
        self._fill(kept, dropped, wanted)
        rest = [group for group in groups if not any(group is other for other in (*kept[:wanted], *dropped))]
        if self.stragglers != "abort":
            # Of a complete group no token would be new, so with resume_masked all of it would be masked.
            masked = self.stragglers == "resume_masked"
            self.buffer = [group for group in rest if not (masked and group.complete)]
        version = _sampling_version(agent.versions, kept[:wanted])
        self._counted = self._counters(groups, kept[:wanted], dropped, aborted, resumed, version)
        return self._finished(kept[:wanted], version)

    @contextlib.asynccontextmanager
    async def _agent(self, *, routing: bool) -> AsyncIterator[Agent]:
        services = Services(Scorer(self.reward), self.encode)
        make, limits = self.environments.make, self.environments.limits
        async with self.connect() as engine:
            yield Agent(engine, make, services, self.decode, self.sampling, limits, self.seed, routing)

    def _fill(self, kept: list[Group], dropped: list[Group], wanted: int) -> None:
        """Where dynamic sampling gave up, take groups without a signal rather than fewer; say so."""
        missing = wanted - len(kept)
        if missing <= 0:
            return
        found = f"{len(dropped)} of {len(kept) + len(dropped)} groups had equal rewards"
        if not kept:
            raise RewardError(
                f"{found}, so nothing can be learned from them: the problems are all too easy or too hard, or the "
                "verifier does not tell answers apart; look at rollouts.jsonl, or set rollout.dynamic_sampling=false"
            )
        self.say(f"dynamic sampling: {found}; {missing} of them fill the batch of {wanted}")
        kept += dropped[:missing]
        del dropped[:missing]

    def _finished(self, groups: Sequence[Group], version: int | None) -> tuple[RolloutGroup, ...]:
        """As records. version: with resume_masked the loss counts its tokens only; None: all tokens."""
        masked = self.stragglers == "resume_masked" and version is not None
        return tuple(
            RolloutGroup(
                group.prompt,
                tuple(
                    one.completion(self.decode, self.sampling, trained=lambda v: not masked or v == version)
                    for one in group.trajectories
                ),
                tuple(one.score() for one in group.trajectories),
            )
            for group in groups
        )

    def _counters(
        self,
        groups: Sequence[Group],
        kept: Sequence[Group],
        dropped: Sequence[Group],
        aborted: int,
        resumed: Sequence[Group],
        version: int,
    ) -> dict[str, Metric]:
        """The metrics of a batch beside `rollout_metrics`; tokens_lag_N counts tokens that are N versions older."""
        trajectories = [one for group in kept for one in group.trajectories]
        lags = Counter(version - v for one in trajectories for v, m in zip(one.versions, one.mask, strict=True) if m)
        found: dict[str, Metric] = {
            f"rollout/{name}": metric for name, metric in _of_trajectories(trajectories).items()
        }
        found |= {f"rollout/tokens_lag_{lag}": Sum(float(count)) for lag, count in sorted(lags.items())}
        numbers = {
            "started_groups": len(groups) - len(resumed),
            "dropped_groups": len(dropped),
            "resumed": sum(len(group.trajectories) for group in resumed),
            "aborted": aborted,
        }
        return found | {f"rollout/{name}": Sum(float(number)) for name, number in numbers.items()}


class _Running:
    """Groups under way, one task for each trajectory. Leaving the context by an error ends them all."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._tasks: dict[asyncio.Task[None], Group] = {}
        self.groups: list[Group] = []

    async def __aenter__(self) -> _Running:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self._agent.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(EngineError):  # the first error is the one to tell
            await self._agent.engine.abort()

    def start(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.groups.append(group)
            for trajectory in group.trajectories:
                self._tasks[asyncio.create_task(self._agent.run(trajectory))] = group

    async def completed(self) -> list[Group]:
        """Wait until at least one trajectory ends. Takes out and returns the groups that are complete now (maybe none),
        in the order in which they were started."""
        await self._wait(None)
        done = [group for group in self.groups if group.complete]
        self.groups = [group for group in self.groups if not group.complete]
        return done

    async def stop(self) -> int:
        """Stop every trajectory where it is; the number of those that had not ended."""
        self._agent.stopping = True
        while self._tasks:
            await self._agent.engine.abort()
            await self._wait(ABORT_AGAIN_S)
        return sum(one.finish_reason is None for group in self.groups for one in group.trajectories)

    async def closed(self) -> None:
        """Wait until the environments of complete groups are closed as well."""
        while self._tasks:
            await self._wait(None)

    async def _wait(self, timeout_s: float | None) -> None:
        """Wait until at least one task is done, and raise its error. Ends without a timeout, too, because every request
        and every step of an environment has a deadline of its own."""
        done, _ = await asyncio.wait(self._tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._tasks[task]
            task.result()


def _started(prompts: Sequence[Prompt], step: str, members: int, seen: Counter[str]) -> Iterator[Group]:
    """A prompt that comes twice in one batch gets other members, and so other seeds."""
    for prompt in prompts:
        first = seen[prompt.id] * members
        seen[prompt.id] += 1
        yield Group([Trajectory(prompt, step, member) for member in range(first, first + members)])


def _restored(row: dict[str, Any], routing: bool) -> Trajectory:
    """From a checkpoint, maybe of a run that asked for no experts, or did; a batch has those of all tokens, or none. Of
    a trajectory that goes on, the next request tells those of all tokens; one that is done is begun anew."""
    one = Trajectory.of(row)
    if not routing:
        one.routed = None
    elif one.routed is None and one.finish_reason is not None:
        return Trajectory(one.prompt, one.step, one.member)
    return one


def _sampling_version(fresh: Set[int], kept: Sequence[Group]) -> int:
    """The weight version of a batch. fresh: versions of what was sampled just now, which must be one; if nothing had to
    be sampled, the newest version in `kept`."""
    if len(fresh) > 1:
        raise EngineStaleError(
            f"one rollout batch was sampled with weight versions {sorted(fresh)}; expected a single one; "
            "weights must not be published while the engine generates"
        )
    return max(fresh or {version for group in kept for one in group.trajectories for version in one.versions})


def _of_trajectories(trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
    """turns, observed_tokens, cut_observations and whatever environments count, means over trajectories."""
    count = len(trajectories)
    names = sorted({"cut_observations"}.union(*(one.counts for one in trajectories)))
    found: dict[str, Metric] = {
        "turns": Mean(sum(len(one.turns) for one in trajectories), count),
        "observed_tokens": Mean(sum(one.mask.count(0) for one in trajectories), count),
    }
    return found | {name: Mean(sum(one.counts.get(name, 0.0) for one in trajectories), count) for name in names}
