"""Trajectories -> rows of a feed (`feed/`). Nothing is tokenised here: ids are those that the engine read and drew.

A choice of the endpoint, asked with logprobs and `return_token_ids`, has

    prompt_token_ids    what the engine read before it: the whole history, by the chat template or as given
    token_ids           what was sampled, the stop token included
    logprobs            of these tokens: content[i].logprob (chat) or token_logprobs[i] (completions)
    weight_versions     of these tokens, or one weight_version for all

Several choices are turns of one conversation: each one's prompt must begin with all tokens until then, so that the
policy is trained on the very sequence that it saw. What comes between is an observation, masked as the prompt is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sglang.art.records import trajectories_of
from megatron_sglang.errors import DataError

_FINISH = {"stop": "stop", "tool_calls": "stop", "function_call": "stop", "length": "length"}
_REMEDY = (
    "ask the endpoint with logprobs and extra_body={'return_token_ids': True}, as model.openai_client() does, and put "
    "its choice into the trajectory as it is"
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a choice says of one turn."""

    prompt_ids_T: tuple[int, ...]
    ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    version: int
    finish_reason: str
    text: str


def rows(groups: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """A row for each trajectory of each group. `DataError` names group, trajectory and turn."""
    return [
        [_row(trajectory, f"group {number}, trajectory {member}") for member, trajectory in _members(group, number)]
        for number, group in enumerate(groups)
    ]


def _members(group: Any, number: int) -> list[tuple[int, Any]]:
    found = trajectories_of(group)
    for member, trajectory in enumerate(found):
        if isinstance(trajectory, BaseException):
            raise DataError(
                f"group {number}, trajectory {member} is an error: {trajectory!r}; leave it out or repeat it"
            )
    return list(enumerate(found))


def _row(trajectory: Any, where: str) -> dict[str, Any]:
    if getattr(trajectory, "additional_histories", None):
        raise DataError(f"{where} has additional_histories; give each history as a trajectory of its own")
    items = _get(trajectory, "messages_and_choices")
    if not isinstance(items, Sequence):
        raise DataError(f"{where} has no messages_and_choices; expected a Trajectory")
    turns = [_sampled(item, f"{where}, item {index}") for index, item in enumerate(items) if _is_choice(item)]
    if not turns:
        raise DataError(
            f"{where} has {len(items)} messages and no choice: the model said nothing that could be trained"
        )
    ids, mask, logprobs = _stitch(turns, where)
    reward = _number(_get(trajectory, "reward"), where)
    passed = (_get(trajectory, "metrics") or {}).get("passed", reward >= 1.0)
    return {
        "ids": ids,
        "mask": mask,
        "logprobs": logprobs,
        "version": turns[-1].version,
        "reward": reward,
        "passed": bool(passed),
        "text": "\n".join(turn.text for turn in turns),
        "turns": len(turns),
        "finish_reason": turns[-1].finish_reason,
    }


def _number(reward: Any, where: str) -> float:
    """Also of numpy's and torch's numbers."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(found := float(reward)):
            return found
    raise DataError(f"{where} has reward {reward!r}; expected a finite number")


def _stitch(turns: Sequence[Sampled], where: str) -> tuple[list[int], list[int], list[float]]:
    """One sequence of all turns: ids, mask, logprobs."""
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    for number, turn in enumerate(turns):
        history = list(turn.prompt_ids_T)
        if history[: len(ids)] != ids:
            at = next((at for at, (a, b) in enumerate(zip(ids, history, strict=False)) if a != b), len(history))
            raise DataError(
                f"{where}: the prompt of turn {number} is not the history continued: token {at} of {len(ids)} differs. "
                "Text that was sampled and is written into a prompt again may become other tokens; send the history as "
                "token ids to /v1/completions, or give each turn as a trajectory of its own"
            )
        if turn.version != turns[0].version:
            raise DataError(
                f"{where}: turn {number} was sampled with weight version {turn.version}, turn 0 with "
                f"{turns[0].version}; sample a trajectory between two calls of train"
            )
        seen = len(history) - len(ids)
        ids = [*history, *turn.ids_T]
        mask += [0] * seen + [1] * len(turn.ids_T)
        logprobs += [0.0] * seen + list(turn.logprobs_T)
    return ids, mask, logprobs


def _sampled(choice: Any, where: str) -> Sampled:
    ids, prompt = _get(choice, "token_ids"), _get(choice, "prompt_token_ids")
    if not ids or not prompt:
        what = "token_ids" if not ids else "prompt_token_ids"
        raise DataError(f"{where}: the choice has no {what}, and text is never tokenised again; {_REMEDY}")
    logprobs = _logprobs(choice)
    if len(logprobs) != len(ids):
        raise DataError(f"{where}: the choice has {len(ids)} token_ids and {len(logprobs)} logprobs; {_REMEDY}")
    versions = set(_get(choice, "weight_versions") or [_get(choice, "weight_version")])
    if len(versions) != 1 or None in versions:
        raise DataError(
            f"{where}: the choice is of weight versions {sorted(map(str, versions))}, expected one; {_REMEDY}, and "
            "sample between two calls of train"
        )
    finish = _FINISH.get(_get(choice, "finish_reason") or "")
    if finish is None:
        raise DataError(
            f"{where}: the choice ended by {_get(choice, 'finish_reason')!r}; expected {', '.join(_FINISH)}: sample it "
            "again"
        )
    message = _get(choice, "message")
    text = _get(message, "content") if message is not None else _get(choice, "text")
    return Sampled(tuple(prompt), tuple(ids), tuple(logprobs), versions.pop(), finish, text or "")


def _logprobs(choice: Any) -> list[float]:
    """Logprobs of the sampled tokens, from chat's form or from that of completions."""
    found = _get(choice, "logprobs")
    if found is None:
        return []
    if (content := _get(found, "content")) is not None:
        return [_get(token, "logprob") for token in content]
    return list(_get(found, "token_logprobs") or [])


def _is_choice(item: Any) -> bool:
    """A message has a role; a choice says how it ended."""
    return _get(item, "role") is None and _get(item, "finish_reason") is not None


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
