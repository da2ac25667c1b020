"""What an agent acts in, and how a run finds it by name.

    call           SkyRL    gives
    reset(prompt)  init     what stands before the first turn, "" for nothing
    step(turn)     step     Step: observation, reward, done, passed, detail
    close()        close    nothing; always called, once

An environment serves one trajectory. `rollout.environment` is {name, limits of the loop, arguments of its own}; a name
is one of `SHIPPED` or "package.module:Class". The class is called with a `Services` and its own arguments by keyword.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, cast

from megatron_sglang.config_check import suggest
from megatron_sglang.errors import ConfigError
from megatron_sglang.types import Completion, Prompt, Score

Observation = str | tuple[int, ...]
"""Text, in which no special token is read; or token ids, from an environment that wants some."""

SHIPPED = {
    "single": "megatron_sglang.agents.single:Single",
    "fim_repair": "megatron_sglang.agents.fim_repair:FimRepair",
    "arithmetic": "megatron_sglang.agents.arithmetic:Arithmetic",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment says to one turn.

    >>> Step("1786\\n", counts={"tool_calls": 1})
    """

    observation: Observation = ""
    """Comes after the turn, before the next one; unused where `done`."""
    reward: float = 0.0
    """Of the whole trajectory, were it to end here. The last step's counts; limits may make any step the last one."""
    done: bool = False
    passed: bool = False
    """Whether the task is entirely solved."""
    detail: str = ""
    """For people to read, as `Score.detail`."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Added up over the turns; reported as rollout/<name>, mean over trajectories."""


@dataclass(frozen=True, slots=True)
class Services:
    """What a run gives its environments."""

    score: Callable[[Prompt, Completion], Awaitable[Score]]
    """The run's verifier; runs in a thread, several completions at a time."""
    encode: Callable[[str], tuple[int, ...]]
    """Plain text to token ids: no special tokens around it, and none read in it."""


class Environment(Protocol):
    """Serves one trajectory, from one event loop. Raises only where it is itself broken, not for a bad answer.

    A trajectory that is taken up again meets a new environment: `reset`, then `step` with each turn it has had, of
    which the answers are not looked at. So what `step` says must follow from the turns alone, and it must not change
    the world outside.
    """

    def reset(self, prompt: Prompt) -> Observation: ...

    async def step(self, turn: Completion) -> Step:
        """turn: the tokens of this turn; `text` without the stop token or the stop text that ended it, the latter being
        `stopped_by`."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the loop grants any environment. The tokens of a whole trajectory are bounded by rollout.max_new_tokens."""

    max_turns: int = 1
    """Turns of the model."""
    max_turn_tokens: int = 0
    """Longest turn, its stop token included; 0: what is left of the trajectory."""
    max_observation_tokens: int = 256
    """Longest observation; a longer one loses its end, which rollout/cut_observations counts."""
    step_timeout_s: float = 600.0
    """Deadline for the environment's answer to one turn, and for its `close`; waiting for the verifier, whose jobs have
    deadlines of their own, is not counted."""

    def __post_init__(self) -> None:
        for name, least in (("max_turns", 1), ("max_turn_tokens", 0), ("max_observation_tokens", 1)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ConfigError(f"rollout.environment.{name}={value!r}; expected a whole number, {least} or above")
        if not self.step_timeout_s > 0:
            raise ConfigError(f"rollout.environment.step_timeout_s={self.step_timeout_s}; expected above 0 seconds")


LIMITS = tuple(item.name for item in fields(Limits))

DEFAULT_TURNS = 3
"""Of an environment that is asked for without max_turns."""


@dataclass(frozen=True, slots=True)
class Environments:
    """A kind of environment with its arguments; `make` gives one for each trajectory."""

    name: str
    limits: Limits
    make: Callable[[Services], Environment]

    @staticmethod
    def of(asked: Mapping[str, Any]) -> Environments:
        """Read `rollout.environment`; `ConfigError`, with a suggestion, for a name or argument that does not exist.

        Empty: one turn, scored by the run's verifier.
        """
        arguments: dict[str, Any] = {key: given for key, given in asked.items() if key not in LIMITS}
        name = arguments.pop("name", "") if asked else "single"
        if not isinstance(name, str) or not name:
            raise ConfigError(f"rollout.environment has no name; expected {', '.join(SHIPPED)} or package.module:Class")
        make = _find(name)
        _check_arguments(name, make, arguments)
        return Environments(name, limits_of(asked), lambda services: make(services, **arguments))


def limits_of(asked: Mapping[str, Any]) -> Limits:
    """Those in `rollout.environment`; nothing of what it names is imported."""
    limits: dict[str, Any] = {"max_turns": DEFAULT_TURNS} if asked else {}
    return Limits(**limits | {key: asked[key] for key in LIMITS if key in asked})


def _find(name: str) -> Callable[..., Environment]:
    path = SHIPPED.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ConfigError(
            f"rollout.environment.name={name!r} is unknown{suggest(name, SHIPPED)}; "
            f"there are {', '.join(SHIPPED)}, and yours as package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"rollout.environment.name={name!r} cannot be imported: {error}; "
            "expected package.module:Class on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"rollout.environment.name={name!r} is a {type(found).__name__}; expected a class")
    return cast("Callable[..., Environment]", found)


def _check_arguments(name: str, make: Callable[..., Environment], arguments: Mapping[str, Any]) -> None:
    parameters = dict(list(inspect.signature(make).parameters.items())[1:])  # the first one is the services
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [key for key, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    everything = [*known, *LIMITS]
    for key in arguments:
        if key not in known and not open_ended:
            raise ConfigError(
                f"rollout.environment.{key} is not an argument of {name}{suggest(key, everything)}; "
                f"it has {', '.join(everything)}"
            )
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ConfigError(f"rollout.environment of {name} lacks {', '.join(missing)}; set it")
