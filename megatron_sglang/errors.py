"""Every error this package raises on purpose.

    MegatronSglangError
    |- ConfigError        ValueError     an option, flag or combination of sizes that cannot work
    |- DataError          ValueError     a data set, problem or checkpoint folder that cannot be read
    |- SetupError         RuntimeError   the environment lacks something, or has an unknown version of it
    |- EngineError        RuntimeError   the rollout engine
    |  |- EngineStartError               it did not come up; carries its last log lines
    |  |- EngineDiedError                it was there and is gone
    |  |- EngineTimeoutError             it did not answer before the deadline
    |  `- EngineStaleError               its weights are not of a published version; it must not serve
    |- WeightSyncError    RuntimeError   a weight version could not be delivered; names version, bucket, rank
    |- RewardError        RuntimeError   a reward function raised, hung or returned no number
    |- SandboxError       RuntimeError   no sandbox of the demanded strength can be had
    |- DivergedError      RuntimeError   losses are not finite any more
    `- StoppedError       RuntimeError   a signal has stopped another rank, where it is `Stopped`

A message names the subject, what was observed, what was expected, and the remedy.
All of them can be sent to other ranks as text and raised there again (`from_text`).
"""

from __future__ import annotations

import signal


class MegatronSglangError(Exception):
    """Base of all errors of this package."""


class ConfigError(MegatronSglangError, ValueError):
    """An option, flag or combination of sizes that cannot work."""


class DataError(MegatronSglangError, ValueError):
    """A data set, problem or checkpoint folder that cannot be read."""


class SetupError(MegatronSglangError, RuntimeError):
    """The environment lacks something, or has an unknown version of it."""


class EngineError(MegatronSglangError, RuntimeError):
    """The rollout engine refused or failed a request."""


class EngineStartError(EngineError):
    """The engine did not come up; the message carries its last log lines."""


class EngineDiedError(EngineError):
    """The engine's process ended while it was needed."""


class EngineTimeoutError(EngineError):
    """The engine did not answer before the deadline."""


class EngineStaleError(EngineError):
    """The engine's weights are not of a published version; it must not serve."""


class WeightSyncError(MegatronSglangError, RuntimeError):
    """A weight version could not be delivered; the message names version, bucket and rank."""


class RewardError(MegatronSglangError, RuntimeError):
    """A reward function raised, hung or returned no number."""


class SandboxError(MegatronSglangError, RuntimeError):
    """No sandbox of the demanded strength can be had on this machine."""


class DivergedError(MegatronSglangError, RuntimeError):
    """Losses stayed non-finite; training stopped without publishing the weights."""


class StoppedError(MegatronSglangError, RuntimeError):
    """A signal has stopped another rank, and with it the run."""


class Stopped(SystemExit):
    """A signal ends this rank; the code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.follows = False
        """Whether it came because another rank had an error, which that one says."""

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class OnOtherRank(Exception):
    """Cause of an error that is raised here because another rank has it. That rank reports it."""


def is_from_other_rank(error: BaseException) -> bool:
    """True if `error`, or what caused it, is of another rank."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OnOtherRank):
        cause = cause.__cause__
    return cause is not None


def _tree(root: type[MegatronSglangError]) -> dict[str, type[MegatronSglangError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_text(kind: str, message: str) -> MegatronSglangError:
    """Rebuild an error that another rank sent as (class name, message); unknown kinds become the base class."""
    return _tree(MegatronSglangError).get(kind, MegatronSglangError)(message)
