"""The pipeline, on one page: publish weights, collect a rollout batch, turn it into samples for Megatron.

    publish:  merged weights -> engine, as one version, or not at all
    collect:  prompts -> rollout -> rewards -> advantages -> samples
    evaluate: held-out prompts -> pass rate

Every rank runs the same calls in the same order. What only one process can do (talk to the engine, run rewards, write
logs) happens on the leader, rank 0; its results and its errors reach all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sglang import metrics, rollout
from megatron_sglang.advantages import ESTIMATORS, group_advantages
from megatron_sglang.config import AlgoConfig
from megatron_sglang.errors import MegatronSglangError, WeightSyncError
from megatron_sglang.feed.sampler import Feed
from megatron_sglang.interfaces import Comm, DirectEngine
from megatron_sglang.memory import Ledger
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.samples import to_all
from megatron_sglang.sync import DirectPath, Path, publish
from megatron_sglang.trace import RunLog
from megatron_sglang.types import Prompt, RolloutGroup, SyncReport, TrainSample


@dataclass(frozen=True, slots=True)
class Leader:
    """What only rank 0 has."""

    engine: DirectEngine
    rollout: rollout.Sampler
    prompts: PromptSource | Feed
    held_out: Sequence[Prompt]
    log: RunLog


MAX_DEATHS = 3
"""Engine deaths without a collected rollout batch between them before the run ends."""


class Cycle:
    """One rollout batch after another; `version` is the last published weight version.

    path: how weights travel. None: by the direct path alone. make_direct: makes the direct path, which is tried with
    each engine's first version and, if it proves right, replaces `path` (`_first_version`). None: keep to `path`.

    An engine that dies is started anew and given the version that it held; then the call that it died in is repeated.
    """

    def __init__(
        self,
        comm: Comm,
        path: Path | None,
        leader: Leader | None,
        algo: AlgoConfig,
        seed: int,
        make_direct: Callable[[], DirectPath] | None = None,
    ) -> None:
        assert (leader is not None) == (comm.rank == 0), "exactly rank 0 leads"
        self.comm, self.path, self.leader, self.make_direct = comm, path, leader, make_direct
        self._at_start = (path, make_direct)
        """For an engine that is started again, with which the direct path must be made again."""
        self._proved_plan: Any = None
        """The plan by which the direct path has left the same bits in the engine as `path`."""
        self._deaths = 0
        self.algo, self.seed = algo, seed
        self.version = 0
        self.ledger = Ledger.of_device()
        """Of this rank's device; None on a CPU."""
        self._record: dict[str, metrics.Metric] = {}

    def publish(self) -> SyncReport:
        """Give the engine the weights as they are now. On failure the engine stays stale and every rank raises."""
        return self._surviving(lambda: self._publish(self.version + 1), needs_weights=False)

    def _publish(self, version: int) -> SyncReport:
        """Send the weights as they are now under this number: a new version, or to a new engine the last one again."""
        with self.span("sync"):
            if self.make_direct is None:
                report = self._send(self.path, version)
            else:
                report = self._first_version(self.make_direct, version)
                self.make_direct = None
        self.version = version
        self.add({f"sync/{name}": metrics.Last(number) for name, number in _numbers(report).items()})
        if self.leader is not None and (resume_s := self.leader.engine.take_resume_s()):
            self.add({"sync/resume_s": metrics.Last(resume_s)})
        self.note_memory("sync")
        return report

    def _send(self, path: Path | None, version: int) -> SyncReport:
        assert path is not None, "without another path the direct one is made with the first version"
        return publish(self.comm, self._engine, path, version)

    def _first_version(self, make_direct: Callable[[], DirectPath], version: int) -> SyncReport:
        """Send an engine's first version by `path`, then again by the direct path, and stay with the latter if both
        leave the same bits. An engine that is started again, and for which the plan comes out as the one that was
        compared so, need not be sent to twice."""
        if self.path is None:
            return self._adopt(make_direct(), version)
        reference = self._send(self.path, version) if self._proved_plan is None else None
        try:
            direct = make_direct()
            if reference is None and direct.plan is not self._proved_plan:
                reference = self._send(self.path, version)
            return self._adopt(direct, version, reference)
        except WeightSyncError as error:
            if self.leader is not None:
                self.leader.log.say(f"weight sync: the generic path, because the direct one does not apply: {error}")
            return self._send(self.path, version)

    def _adopt(self, direct: DirectPath, version: int, reference: SyncReport | None = None) -> SyncReport:
        """Send by the direct path, now and from now on. reference: the same version's report by the generic path; the
        engine digests must be equal, before anything is served."""
        if reference is not None and self.leader is not None:
            self.leader.engine.hold_back("what the direct path has left is not compared with the generic path's yet")
        report = self._send(direct, version)
        if reference is not None and report.engine_digest != reference.engine_digest:
            reason = (
                f"its engine digest {report.engine_digest} is not that of the generic path, {reference.engine_digest}"
            )
            if self.leader is not None:
                self.leader.engine.fail_update(reason)
            raise WeightSyncError(reason)
        if reference is not None:
            self.comm.from_leader(lambda: self._lead.engine.serve(version))
            self._proved_plan, how = direct.plan, "as by the generic path"
        else:
            how = "not compared with the generic path" if self._proved_plan is None else "by the plan that was compared"
        if self.leader is not None:
            self.leader.log.say(
                f"weight sync: the direct path, {report.buckets} buckets, {report.bytes:,} bytes; "
                f"engine digest {report.engine_digest}, {how}"
            )
        self.path = direct
        return report

    def collect(self, step: int) -> list[TrainSample]:
        """The samples of rollout batch `step`, the same list on every rank."""
        samples = self._surviving(lambda: to_all(self.comm, lambda: self._samples(step)))
        self._deaths = 0
        self.note_memory("rollout")
        return samples

    def before_training(self) -> None:
        """When a rollout batch's samples are scored, and its first train step comes next."""

    def learning_rate(self) -> float | None:
        """The one that came with the last rollout batch (`feed/`), on every rank; None: Megatron's schedule decides."""
        return self.comm.from_leader(lambda: getattr(self._lead.rollout, "learning_rate", None))

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics (empty without held-out prompts), on every rank; noted in the record."""
        return self._surviving(lambda: self.comm.from_leader(self._evaluate))

    def _surviving[T](self, work: Callable[[], T], *, needs_weights: bool = True) -> T:
        """What `work` gives, on every rank. If the engine dies in it, start the engine anew and do `work` again.
        needs_weights: publish the last version again before that."""
        revived = False
        while True:
            try:
                if revived and needs_weights:
                    self._publish(self.version)
                return work()
            except MegatronSglangError as error:
                reason = self.comm.from_leader(lambda: self._lead.engine.why_dead() or "")
                if not reason or self._deaths == MAX_DEATHS:
                    raise
                self._revive(error)
                revived = True

    def _revive(self, error: MegatronSglangError) -> None:
        self._deaths += 1
        self.add({"engine/deaths": metrics.Sum(1.0)})
        if self.leader is not None:
            self.leader.log.say(f"engine: starting it again ({self._deaths} of {MAX_DEATHS}), because {error}")
        with self.span("restart"):
            self.comm.from_leader(lambda: self._lead.engine.restart())
        self.path, self.make_direct = self._at_start  # the plan that was installed died with the engine

    def span(self, name: str) -> Any:
        """Context manager that times a phase of this rollout batch."""
        return self.leader.log.span(name) if self.leader is not None else contextlib.nullcontext()

    def add(self, found: Mapping[str, metrics.Metric]) -> None:
        """Report metrics of this rollout batch; what comes several times (train steps) is reduced."""
        self._record = metrics.merge([self._record, found])

    def note_memory(self, phase: str, *, same: bool = False) -> None:
        """Report what is free on the devices now; see `Ledger.note`."""
        if self.ledger is not None:
            self.add(self.ledger.note(self.comm, phase, same=same))

    def close_step(self, step: int) -> None:
        """Write what was reported as the record of rollout batch `step`."""
        if self.leader is not None:
            self.leader.log.step(step, metrics.values(self._record))
        self._record = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside Megatron's own state; the same on every rank."""
        parts = self.comm.from_leader(
            lambda: {"prompts": self._lead.prompts.state(), "rollout": self._lead.rollout.state()}
        )
        return {"version": self.version, **parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; DataError on all ranks if the data set is another."""
        self.version = state["version"]
        self.comm.from_leader(lambda: self._lead.prompts.restore(state["prompts"]))
        self.comm.from_leader(lambda: self._lead.rollout.restore(state.get("rollout", {})))

    @property
    def _engine(self) -> DirectEngine | None:
        return self.leader.engine if self.leader is not None else None

    # ---- on the leader only ----

    @property
    def _lead(self) -> Leader:
        assert self.leader is not None, "only the leader talks to the engine"
        return self.leader

    def _samples(self, step: int) -> list[TrainSample]:
        """`_rollout`; if that fails, prompts and begun rollouts are put back first, so that it can be repeated."""
        prompts, begun = self._lead.prompts.state(), self._lead.rollout.state()
        try:
            return self._rollout(step)
        except MegatronSglangError:
            self._lead.prompts.restore(prompts)
            self._lead.rollout.restore(begun)
            raise

    def _rollout(self, step: int) -> list[TrainSample]:
        """Prompts, completions, rewards, advantages: the samples of rollout batch `step`."""
        lead = self._lead
        with lead.log.span("rollout"):
            groups = lead.rollout.batch(lead.prompts, step)
        lead.log.rollouts(step, groups, prompt_text=lambda prompt: lead.rollout.decode(prompt.token_ids_T))
        self.add(lead.rollout.metrics(groups))
        advantages = group_advantages(self._rewards(groups, step), *ESTIMATORS[self.algo.advantage])
        return rollout.to_samples(groups, advantages.advantages_PG)

    def _rewards(self, groups: Sequence[RolloutGroup], step: int) -> torch.Tensor:
        rewards_PG = rollout.rewards(groups)
        if self.algo.shuffle_rewards:  # the control experiment: rewards that say nothing about their completions
            generator = torch.Generator().manual_seed(self.seed + step)
            order = torch.randperm(rewards_PG.numel(), generator=generator)
            rewards_PG = rewards_PG.flatten()[order].view_as(rewards_PG)
        return rewards_PG

    def _evaluate(self) -> dict[str, float]:
        lead = self._lead
        if not lead.held_out:
            return {}
        with lead.log.span("eval"):
            _, found = lead.rollout.evaluate(lead.held_out)
        self.add(found)
        return metrics.values(found)


def _numbers(report: SyncReport) -> dict[str, float]:
    """The report as the numbers that are logged as sync/<name>."""
    found = report.fidelity
    numbers = {"version": report.version, "bytes": report.bytes}
    numbers |= {"update_norm": found.update_norm, "cast_loss": found.cast_loss, "changed": found.changed}
    for layer, (norm, cast_loss) in found.layers.items():
        numbers |= {f"update_norm/layer_{layer}": norm, f"cast_loss/layer_{layer}": cast_loss}
    return numbers | {f"{phase}_s": seconds for phase, seconds in report.seconds.items()}
