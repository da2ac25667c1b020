"""Verifiers: what turns a completion into a score. `create_reward` is the door; heavy parts load behind it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sglang.interfaces import Reward


def create_reward(
    name: str = "auto",
    *,
    sandbox: str = "auto",
    workers: int = 2,
    timeout_s: float = 2.0,
    memory_mb: int = 512,
    binary: bool = False,
    unsafe: bool = False,
    all_pure: bool = False,
    lean_project: str | None = None,
    sources: Collection[str] = (),
) -> Reward:
    """A verifier by name: a data source ("fim_python", "fim_lean"), "auto" or "function:package.module.function".

    "auto" goes by each prompt's `data_source`; Lean is included if `lean_project` (a folder) is given. `sandbox` is a
    tier's name or "auto", `unsafe` permits the tier "unsafe-local", `all_pure` the tier "restricted"; `timeout_s` of
    CPU (three times that by the clock, so that a busy machine does not change rewards; for a function and for Lean:
    by the clock) and `memory_mb` bound one completion. `sources` are the data sources to be scored, as far as known:
    one that "auto" has no verifier for is refused now, not after the first rollout. Its `tier` says what will run the
    code. Raises `ConfigError`, `SandboxError` or `SetupError` at once if it cannot work here.
    """
    from megatron_sglang.rewards import registry

    options = registry.Options(sandbox, workers, timeout_s, memory_mb, binary, unsafe, all_pure, lean_project)
    return registry.create(name, options, sources)
