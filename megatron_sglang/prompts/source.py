"""Data sets -> `Prompt` records, and the seeded, resumable order in which training draws them.

`load_prompts` reads JSONL or parquet, row by row in one of three schemas, told apart by their columns:
fim     prefix, suffix, ...: see schema.py; the prompt is built with the tokenizer's FIM tokens
verl    data_source, prompt, reward_model{ground_truth}, ability, extra_info
slime   `Keys.input`, `Keys.label`, `Keys.metadata` (its --input-key, --label-key, --metadata-key)
A prompt of the last two is text or chat messages; what its verifier sees is extra_info or metadata, plus
`ground_truth`. If their data_source is a FIM one, extra_info or metadata must hold the FIM fields. A null is no value:
parquet has one for each field that other rows have.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.prompts.fim import FimTokens
from megatron_sglang.prompts.schema import FIM_LEAN, FIM_PYTHON, check_problem
from megatron_sglang.types import Prompt

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Keys:
    """Column names of slime's schema; `data_source` is the verifier of rows that name none."""

    prompt: str = "prompt"
    label: str = "label"
    metadata: str = "metadata"
    data_source: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The prompts of a file in file order, and how many were left out for their length."""

    prompts: tuple[Prompt, ...]
    skipped: int


def load_tokenizer(folder: str | Path) -> Any:
    """The Hugging Face tokenizer of a checkpoint folder; `DataError` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer of {folder} cannot be loaded: {error}; expected a Hugging Face folder") from error


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    too_long: Literal["error", "skip"] = "error",
    keys: Keys | None = None,
) -> Loaded:
    """Read a whole data set. `DataError` names file and line; a prompt over the limit is an error or is skipped."""
    reader = _Reader(tokenizer, keys or Keys())
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    skipped = 0
    for where, row in _rows(Path(path)):
        prompt = reader.prompt(row, where)
        if prompt.id in seen:
            raise DataError(f"{where}: id {prompt.id!r} is already that of {seen[prompt.id]}; ids must be unique")
        seen[prompt.id] = where
        if len(prompt.token_ids_T) <= max_prompt_tokens:
            prompts.append(prompt)
        elif too_long == "skip":
            skipped += 1
        else:
            raise DataError(
                f"{where}: prompt {prompt.id!r} has {len(prompt.token_ids_T)} tokens; at most {max_prompt_tokens} fit; "
                "raise data.max_prompt_tokens, or leave such prompts out with data.overlong=skip"
            )
    if not prompts:
        raise DataError(f"{path}: no prompt was read ({skipped} skipped as too long); expected at least one row")
    return Loaded(tuple(prompts), skipped)


@dataclass(frozen=True)
class _Reader:
    """Turns one row into a `Prompt`."""

    tokenizer: Any
    keys: Keys

    @cached_property
    def fim(self) -> FimTokens:
        return FimTokens.of(self.tokenizer)

    def prompt(self, row: Row, where: str) -> Prompt:
        given = _present(row)
        if "prefix" in given and "suffix" in given:
            if self.keys.data_source:
                given.setdefault("data_source", self.keys.data_source)
            check_problem(given, where)
            _require_text((given["prefix"], given["suffix"]), where)
            token_ids = self.fim.prompt(given["prefix"], given["suffix"])
            return Prompt(given["id"], token_ids, given["data_source"], given)
        verl = "reward_model" in given
        input_key = "prompt" if verl else self.keys.prompt
        if input_key not in given:
            raise DataError(
                f"{where}: row lacks {input_key!r}, it has {', '.join(given) or 'no field'}; "
                "expected prefix and suffix (FIM), prompt and reward_model (verl), or the configured input key"
            )
        problem = _verl_problem(row, where) if verl else self._slime_problem(row, where)
        data_source = str(problem.get("data_source") or self.keys.data_source)
        if not data_source:
            raise DataError(
                f"{where}: no data_source says which verifier scores it; add it, or name one for all in reward.name"
            )
        problem |= {"id": str(given.get("id", Path(where).name)), "data_source": data_source}
        if data_source in (FIM_PYTHON, FIM_LEAN):
            problem = _present(problem)
            check_problem(problem, where)
        return Prompt(problem["id"], self._encode(row[input_key], where), data_source, problem)

    def _slime_problem(self, row: Row, where: str) -> dict[str, Any]:
        problem = dict(_mapping(row, self.keys.metadata, where))
        if row.get("data_source") is not None:
            problem["data_source"] = row["data_source"]
        if self.keys.label in row:
            problem["ground_truth"] = row[self.keys.label]
        return problem

    def _encode(self, prompt: Any, where: str) -> tuple[int, ...]:
        _require_text(prompt, where)
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        elif _are_messages(prompt):
            try:
                token_ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            except ValueError as error:
                raise DataError(f"{where}: chat messages need a tokenizer with a chat template: {error}") from error
            except (TemplateError, TypeError) as error:  # as for a role that the model does not have, or no content
                raise DataError(
                    f"{where}: the tokenizer's chat template does not take the messages: {error}"
                ) from error
        else:
            raise DataError(f"{where}: prompt is {str(prompt)[:60]!r}; expected text or a list of chat messages")
        if not token_ids:
            raise DataError(f"{where}: prompt is empty; expected at least one token")
        return tuple(token_ids)


def _verl_problem(row: Row, where: str) -> dict[str, Any]:
    reward_model = _mapping(row, "reward_model", where)
    if "ground_truth" not in reward_model:
        raise DataError(
            f"{where}: reward_model has no ground_truth; expected verl's reward_model{{ground_truth, style}}"
        )
    copied = {name: row[name] for name in ("data_source", "ability") if row.get(name) is not None}
    return {**_mapping(row, "extra_info", where), **copied, "ground_truth": reward_model["ground_truth"]}


def _present(row: Row) -> dict[str, Any]:
    """`row` without its nulls."""
    return {name: value for name, value in row.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    """`_present` all the way down; a null in a list is a value."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in _present(value).items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _are_messages(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _require_text(prompt: Any, where: str) -> None:
    """`DataError` for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the prompt has {error.object[error.start]!a}, half a surrogate pair, which is no character; "
            "expected text; write the whole character, or leave it out"
        ) from None


def _mapping(row: Row, name: str, where: str) -> Row:
    value = row.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{where}: field {name} is of type {type(value).__name__}; expected an object")
    return value


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(file and line, row) of every row; blank lines are passed over."""
    if not path.is_file():
        raise DataError(f"data set {path} is not a file; expected a .jsonl or .parquet file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"data set {path} ends in {path.suffix!r}; expected .jsonl or .parquet")
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # bytes, so that a line that is no UTF-8 is reported by its number too
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}; expected one JSON object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}; expected one JSON object a line")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data set {path} cannot be read as parquet: {error}; write it anew") from error
    for number, row in enumerate(table.to_pylist(), 1):
        where = f"{path}: row {number}"
        try:
            json.dumps(row)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {error}; expected columns of text, numbers, lists and structs") from error
        # Chat templates ask which fields a message has: by a null of parquet's, any one would be a call of tools.
        yield where, {name: _without_nulls(item) if _are_messages(item) else item for name, item in row.items()}


class PromptSource:
    """Endless batches of prompts in a seeded order that can be taken up where it was left.

    Every epoch draws a new order from (seed, epoch), or keeps file order without `shuffle`. A draw never crosses
    epochs, so it holds no prompt twice: what is left of an epoch, less than is drawn, is dropped.
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_batch: int, seed: int = 0, shuffle: bool = True) -> None:
        if not 1 <= prompts_per_batch <= len(prompts):
            raise ConfigError(
                f"rollout.prompts_per_batch={prompts_per_batch} with {len(prompts)} prompts in data.train; expected 1 "
                f"to {len(prompts)}"
            )
        self._prompts = tuple(prompts)
        self._prompts_per_batch = prompts_per_batch
        self._seed = seed
        self._shuffle = shuffle
        self._start(epoch=0, position=0)

    @property
    def prompts_per_batch(self) -> int:
        return self._prompts_per_batch

    def draw(self, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts, all different; `ConfigError` for more than there are."""
        if count > len(self._prompts):
            raise ConfigError(
                f"{count} prompts are wanted at once, the data set has {len(self._prompts)}; "
                "lower rollout.prompts_per_batch or rollout.over_sampling"
            )
        if self._position + count > len(self._prompts):
            self._start(self._epoch + 1, 0)
        chosen = self._order[self._position : self._position + count]
        self._position += count
        return tuple(self._prompts[index] for index in chosen)

    def state(self) -> dict[str, Any]:
        """Where it stands, in JSON values; give it to `restore` of a source over the same prompts."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch drawn before `state`; `DataError` if prompts, seed or shuffle differ."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise DataError(
                    f"prompt source was saved with {name}={state.get(name)!r} and now has {own!r}; "
                    "resume with the same data set and settings, or start a new run"
                )
        self._start(state["epoch"], state["position"])

    def _identity(self) -> dict[str, Any]:
        ids = json.dumps([prompt.id for prompt in self._prompts])
        return {"seed": self._seed, "shuffle": self._shuffle, "prompts": hashlib.sha256(ids.encode()).hexdigest()[:16]}

    def _start(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
