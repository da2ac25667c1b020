"""What a run that is fed wants, and what it takes: messages checked to the last token."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_sglang.errors import DataError
from megatron_sglang.text import encodable
from megatron_sglang.types import Completion, FinishReason, Prompt, RolloutGroup, Score

BYTES_PER_TOKEN = 64
"""Of one token of a row as JSON, at most: id, mask, a logprob with 17 digits, text."""

_FINISH: tuple[FinishReason, ...] = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The batch a run waits for."""

    batch: int
    version: int
    """Weight version that every completion must be of."""
    groups: int
    """Their number, or a multiple of it, which is as many train steps."""
    members: int
    """Rows of each group."""
    longest: int
    """Tokens of the longest row."""
    vocab_size: int
    limit_bytes: int
    """Longest message."""

    @staticmethod
    def of(batch: int, version: int, groups: int, members: int, longest: int, vocab_size: int) -> Wanted:
        """What is wanted, with a limit of bytes that leaves room for 16 times as much."""
        rows = 16 * groups * members
        limit = 65536 + rows * (1024 + BYTES_PER_TOKEN * longest)
        return Wanted(batch, version, groups, members, longest, vocab_size, limit)


@dataclass(frozen=True, slots=True)
class Batch:
    """What was given."""

    groups: tuple[RolloutGroup, ...]
    learning_rate: float | None
    """None: the one that holds already: of an earlier batch, else of Megatron's schedule."""


def parse(line: bytes, wanted: Wanted) -> Batch:
    """Groups of a message. `DataError` names what is wrong, with the group and the row."""
    try:
        message = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; expected one object a line") from None
    if not isinstance(message, dict) or message.keys() - {"batch", "learning_rate", "groups"}:
        raise DataError("expected an object with batch, groups and, if wanted, learning_rate")
    if message.get("batch") != wanted.batch:
        raise DataError(f"this is batch {message.get('batch')!r}; the run waits for batch {wanted.batch}")
    rate = message.get("learning_rate")
    if rate is not None and not (is_number(rate) and rate >= 0):
        raise DataError(
            f"learning_rate={rate!r}; expected a finite number, 0 or above, or null for the one that holds already"
        )
    groups = message.get("groups")
    if not isinstance(groups, list) or not all(isinstance(rows, list) for rows in groups):
        raise DataError("groups is not a list of lists of rows")
    if not groups or len(groups) % wanted.groups or any(len(rows) != wanted.members for rows in groups):
        sizes = ", ".join(map(str, sorted({len(rows) for rows in groups}))) or "no"
        raise DataError(
            f"{len(groups)} groups of {sizes} rows; this run takes {wanted.groups} groups of {wanted.members} rows a "
            f"train step (rollout.prompts_per_batch, rollout.samples_per_prompt), or a multiple of those groups"
        )
    parsed = tuple(_group(rows, wanted, number) for number, rows in enumerate(groups))
    return Batch(parsed, None if rate is None else float(rate))


def _group(rows: Sequence[Any], wanted: Wanted, number: int) -> RolloutGroup:
    """Tokens that all rows begin with, none of them sampled, are the prompt; the rest of a row is its completion."""
    for member, row in enumerate(rows):
        if problem := _problem(row, wanted):
            raise DataError(f"group {number}, row {member}: {problem}")
    shared = min(row["mask"].index(1) for row in rows)
    first = rows[0]["ids"]
    shared = next((at for at in range(shared) if any(row["ids"][at] != first[at] for row in rows)), shared)
    if not shared:
        raise DataError(f"group {number}: its rows do not begin with the same token; they are not of one prompt")
    prompt = Prompt(f"{wanted.batch}/{number}", tuple(first[:shared]), "feed")
    completions = tuple(_completion(row, shared) for row in rows)
    scores = tuple(Score(float(row["reward"]), bool(row["passed"])) for row in rows)
    return RolloutGroup(prompt, completions, scores)


def _completion(row: Mapping[str, Any], start: int) -> Completion:
    mask_T = tuple(row["mask"][start:])
    return Completion(
        token_ids_T=tuple(row["ids"][start:]),
        logprobs_T=tuple(
            float(logprob) if sampled else 0.0 for logprob, sampled in zip(row["logprobs"][start:], mask_T, strict=True)
        ),
        finish_reason=row["finish_reason"],
        weight_version=row["version"],
        text=encodable(row["text"]),
        loss_mask_T=() if all(mask_T) else mask_T,
        turns=row["turns"],
    )


_ROW = {
    "ids": list,
    "mask": list,
    "logprobs": list,
    "version": int,
    "reward": (int, float),
    "passed": bool,
    "text": str,
    "turns": int,
    "finish_reason": str,
}


def _problem(row: Any, wanted: Wanted) -> str:
    """What is wrong with a row; empty: nothing."""
    if not isinstance(row, dict) or row.keys() != _ROW.keys():
        return f"expected an object with exactly {', '.join(_ROW)}"
    for name, kind in _ROW.items():
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is not bool):
            return f"{name} is a {type(row[name]).__name__}"
    return _problem_of_tokens(row, wanted) or _problem_of_values(row, wanted)


def _problem_of_values(row: Mapping[str, Any], wanted: Wanted) -> str:
    if row["version"] != wanted.version:
        return (
            f"sampled with weight version {row['version']}; the run is at version {wanted.version}, and what another "
            "one sampled would be off-policy without correction: sample again"
        )
    if not is_number(row["reward"]):
        return f"reward is {row['reward']}; expected a finite number"
    if row["finish_reason"] not in _FINISH:
        return f"finish_reason is {row['finish_reason'][:20]!r}; expected {' or '.join(_FINISH)}"
    return ""


def _problem_of_tokens(row: Mapping[str, Any], wanted: Wanted) -> str:
    ids, mask, logprobs = row["ids"], row["mask"], row["logprobs"]
    if not len(ids) == len(mask) == len(logprobs):
        return f"{len(ids)} ids, {len(mask)} mask and {len(logprobs)} logprobs; expected equal numbers"
    if len(ids) > wanted.longest:
        return (
            f"{len(ids)} tokens; at most {wanted.longest} fit (data.max_prompt_tokens + rollout.max_new_tokens); "
            "make trajectories shorter, or raise those"
        )
    if not all(type(token) is int and 0 <= token < wanted.vocab_size for token in ids):
        return f"an id is not a whole number from 0 to {wanted.vocab_size - 1}"
    if not all(type(one) is int and one in (0, 1) for one in mask):
        return "the mask holds something else than 0 and 1"
    if 1 not in mask:
        return "the mask is 0 everywhere: nothing was sampled, so there is nothing to learn from"
    if mask[0]:
        return "its first token is marked as sampled; a prompt comes before"
    if not all(is_number(logprob) and logprob <= 0 for logprob, one in zip(logprobs, mask, strict=True) if one):
        return "a sampled token's logprob is not a finite number, 0 or below"
    return ""


def is_number(value: Any) -> bool:
    """Finite, and no truth value."""
    # isfinite raises for an int that is too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
