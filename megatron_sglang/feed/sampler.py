"""The run's side of a feed: what `rollout.Rollout` is for prompts of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sglang.config import RunConfig
from megatron_sglang.errors import ConfigError, DataError, EngineDiedError
from megatron_sglang.feed.batch import Wanted, is_number, parse
from megatron_sglang.feed.door import Door
from megatron_sglang.metrics import Metric
from megatron_sglang.rollout import Source, rollout_metrics
from megatron_sglang.types import Prompt, RolloutGroup

TIMEOUT_S = 3300.0
"""How long a batch may be in coming; less than the hour that the other ranks wait for their leader."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Takes rollout batches from another process, the peer: both the `rollout.Sampler` of the run and, since the peer
    chooses the prompts, its `rollout.Source`. On the rank that leads the engine.

    why_dead, version: of the engine. A learning rate that comes with a batch holds from that batch on, after a
    resume too.
    """

    door: Door
    decode: Callable[[Sequence[int]], str]
    why_dead: Callable[[], str | None]
    version: Callable[[], int]
    prompts_per_batch: int
    """Groups of a train step."""
    members: int
    longest: int
    """Tokens of the longest sequence."""
    vocab_size: int
    timeout_s: float = TIMEOUT_S
    span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    _rate: list[float] = field(default_factory=list)

    @staticmethod
    def asked_for(config: RunConfig) -> bool:
        """Whether `rollout.environment` names it. `ConfigError` for options that it does not have."""
        given = config.rollout.environment
        if given.get("name") != "feed":
            return False
        timeout_s = given.get("timeout_s", TIMEOUT_S)
        if given.keys() - {"name", "timeout_s"} or not is_number(timeout_s) or timeout_s <= 0:
            raise ConfigError(f"rollout.environment={given}; expected {{name: feed, timeout_s: SECONDS}}")
        return True

    @staticmethod
    def open(config: RunConfig, engine: Any, decode: Callable[[Sequence[int]], str]) -> Feed:
        """As `config` says, listening already. engine: an `interfaces.Engine`, or several as one."""
        model = json.loads(Path(config.model.hf_path, "config.json").read_text())
        return Feed(
            door=Door(config.log.run_dir),
            decode=decode,
            why_dead=engine.why_dead,
            version=lambda: (getattr(engine, "engines", None) or (engine,))[0].version or 0,
            prompts_per_batch=config.rollout.prompts_per_batch,
            members=config.rollout.samples_per_prompt,
            longest=config.longest_sample,
            vocab_size=model.get("vocab_size") or model["text_config"]["vocab_size"],
            timeout_s=float(config.rollout.environment.get("timeout_s", TIMEOUT_S)),
        )

    @property
    def learning_rate(self) -> float | None:
        """Of the last batch that named one; None: Megatron's own schedule."""
        return self._rate[-1] if self._rate else None

    def batch(self, source: Source, step: int) -> tuple[RolloutGroup, ...]:
        """The groups of the next batch; `source` is not used. Bad batches are refused and waited for again.

        Raises `DataError` when the peer is gone or silent for `timeout_s`, `EngineDiedError` when the engine ends.
        """
        wanted = Wanted.of(step, self.version(), self.prompts_per_batch, self.members, self.longest, self.vocab_size)
        deadline = time.monotonic() + self.timeout_s
        with self.span("feed"):
            self.door.wait_peer(deadline, self._idle)
            self.door.send({"ready": asdict(wanted)})
            while True:
                line = self.door.receive(wanted.limit_bytes, deadline, self._idle)
                try:
                    batch = parse(line, wanted)
                except DataError as error:
                    self.door.send({"refused": str(error)})
                    continue
                self.door.send({"accepted": step})
                if batch.learning_rate is not None:
                    self._rate[:] = [batch.learning_rate]
                return batch.groups

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[tuple[RolloutGroup, ...], dict[str, Metric]]:
        """Nothing: the peer evaluates what it likes, through the engine's endpoint."""
        return (), {}

    def metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
        """See `rollout.rollout_metrics`."""
        return rollout_metrics(groups)

    def draw(self, count: int) -> tuple[Prompt, ...]:
        """No prompts: they are the peer's."""
        return ()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: there is no position in a data set, but the learning rate holds on."""
        return {"feed": True, "learning_rate": self.learning_rate}

    def restore(self, state: Mapping[str, Any]) -> None:
        """`DataError` for the checkpoint of a run that drew prompts itself. One without a learning rate, as older ones
        are, leaves it to Megatron's schedule."""
        if not state.get("feed"):
            raise DataError("the checkpoint is of a run with prompts of its own; expected one that was fed batches")
        rate = state.get("learning_rate")
        self._rate[:] = [] if rate is None else [float(rate)]

    def _idle(self) -> None:
        if reason := self.why_dead():
            raise EngineDiedError(f"engine died while a batch was waited for: {reason}")
