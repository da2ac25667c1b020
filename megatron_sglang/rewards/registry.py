"""From a reward's name to its verifier, and from a prompt's data source to its verifier."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, get_args

from megatron_sglang.config_check import REWARDS
from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.rewards import lean
from megatron_sglang.rewards.boxes import Tier
from megatron_sglang.rewards.function import FunctionReward
from megatron_sglang.rewards.lean import Lean
from megatron_sglang.rewards.python_fim import PythonFim
from megatron_sglang.rewards.sandbox import Limits, Sandbox
from megatron_sglang.types import Completion, Prompt, Score

WALL_PER_CPU = 3.0


class Verifier(Protocol):
    """A `Reward` that can say what it runs code in."""

    @property
    def tier(self) -> str: ...

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword arguments of `create_reward`."""

    sandbox: str
    workers: int
    timeout_s: float
    memory_mb: int
    binary: bool
    unsafe: bool
    all_pure: bool
    lean_project: str | None


def create(name: str, options: Options, sources: Collection[str] = ()) -> Verifier:
    """See `create_reward`."""
    if options.sandbox not in ("auto", *get_args(Tier)):
        raise ConfigError(f"sandbox={options.sandbox!r} is unknown; choose auto, {', '.join(get_args(Tier))}")
    if options.workers < 1 or options.timeout_s <= 0:
        raise ConfigError(
            f"rewards with workers={options.workers}, timeout_s={options.timeout_s}; expected at least 1 and above 0"
        )
    if name.startswith("function:"):
        return FunctionReward(name.removeprefix("function:"), workers=options.workers, timeout_s=options.timeout_s)
    if name == "fim_python":
        return _python(options)
    if name == "fim_lean":
        return _lean(options)
    if name != "auto":
        raise ConfigError(f"reward {name!r} is unknown; choose {', '.join(REWARDS)} or function:PKG.MODULE.FN")
    there = ["fim_python"] + ["fim_lean"] * (options.lean_project is not None)
    if unknown := set(sources) - set(there):
        raise ConfigError(_no_verifier(unknown, there))
    verifiers: dict[str, Verifier] = {"fim_python": _python(options)}
    if options.lean_project is not None:
        verifiers["fim_lean"] = _lean(options)
    return BySource(verifiers)


def _python(options: Options) -> PythonFim:
    limits = Limits(math.ceil(options.timeout_s), WALL_PER_CPU * options.timeout_s, options.memory_mb)
    tier = cast("Tier", options.sandbox)
    sandbox = Sandbox(tier, limits=limits, workers=options.workers, unsafe=options.unsafe, all_pure=options.all_pure)
    return PythonFim(sandbox, binary=options.binary)


def _lean(options: Options) -> Lean:
    return Lean(
        options.lean_project,
        workers=options.workers,
        timeout_s=options.timeout_s,
        memory_mb=max(options.memory_mb, lean.MEMORY_MB),
        unsafe=options.unsafe,
    )


def _no_verifier(unknown: Collection[str], there: Collection[str]) -> str:
    return (
        f"no verifier for data source(s) {', '.join(sorted(unknown))}; there are {', '.join(there)}; name one for all "
        "rows with --rm-type function:PACKAGE.MODULE.FN, or give reward.lean_project for fim_lean"
    )


class BySource:
    """Gives each prompt to the verifier of its `data_source`. Owns the verifiers."""

    def __init__(self, verifiers: Mapping[str, Verifier]) -> None:
        self._verifiers = verifiers

    @property
    def tier(self) -> str:
        return "; ".join(f"{source}: {verifier.tier}" for source, verifier in self._verifiers.items())

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """Scores in the order of `pairs`; `RewardError` for a data source without verifier."""
        unknown = {prompt.data_source for prompt, _ in pairs} - self._verifiers.keys()
        if unknown:
            raise RewardError(_no_verifier(unknown, self._verifiers))
        scores: dict[int, Score] = {}
        for source, verifier in self._verifiers.items():
            chosen = [i for i, (prompt, _) in enumerate(pairs) if prompt.data_source == source]
            scores |= zip(chosen, verifier.score([pairs[i] for i in chosen]), strict=True)
        return [scores[i] for i in range(len(pairs))]

    def close(self) -> None:
        for verifier in self._verifiers.values():
            verifier.close()
