"""The options as text, from the dataclasses and the strings under their fields: `--help` and docs/configuration.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from megatron_sglang import config
from megatron_sglang.config_argv import FLAGS
from megatron_sglang.config_check import field_types

HELP_HEAD = """\
usage: torchrun --nproc-per-node N pretrain_gspo.py [--config FILE] [--dry-run] [OPTION...]

Later wins: defaults, --config FILE (YAML), section.field=value, flags. --SECTION.FIELD VALUE sets any field below.
--sglang-* sets SGLang's ServerArgs; every other flag is Megatron's. --dry-run prints the resolved configuration.
"""

MARKDOWN_HEAD = """\
# Configuration

<!-- Made by `make docs` from megatron_sglang/config.py; change the texts there. -->

Sources, later ones win: the defaults below; the YAML file of `--config FILE`, which holds only differences from them;
overrides `section.field=value`; flags. Every field can be set as `--SECTION.FIELD VALUE`; the short flags are names
known from slime and Megatron-RL. A name nobody knows is an error with a suggestion. `--dry-run` prints the resolved
configuration, which is also written to the run folder.

* Megatron's own arguments keep their names: `--lr 1e-5` on the command line, `lr: 1e-5` under `megatron:` in YAML. The
  plugin derives `global-batch-size` (one step per rollout batch), `train-iters` (from `rollout.batches`), `seq-length`
  (longest prompt plus longest completion), `seed` and `bf16`; the model's architecture comes from `model.hf_path`.
* `--max-seqlen-per-dp-cp-rank N`, also Megatron's (slime's `--max-tokens-per-gpu`, verl's
  `ppo_max_token_len_per_gpu`), packs the samples of a train step without padding into micro-batches of at most N
  tokens, N on each context-parallel rank ([packing](algorithm.md#packed-micro-batches)); `--micro-batch-size` then has
  no meaning. 0 or absent: micro-batches of `--micro-batch-size` samples, padded to the longest.
* SGLang's ServerArgs are reached as `--sglang-log-level info`, or `log_level: info` under `sglang:` in YAML; so is
  `--sglang-router-policy`, for several engines behind sglang-router ([modes.md](modes.md)).
* Values are YAML, but an override or flag whose option is a text is taken as it stands (`0123`, `off`, `a # b`): only
  `null`, quotes around it, and `[a, b]` where a list is meant are read. In a file, put quotes around such a text.
* In YAML `${oc.env:NAME}` is the value of an environment variable.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One own field: `section.name`, its type and default as text, its documentation and its short flags."""

    path: str
    kind: str
    default: str
    text: str
    flags: tuple[str, ...]


def options(section: type) -> Iterator[Option]:
    """The options of one section's dataclass, or the top-level scalars of `RunConfig`."""
    texts = _field_texts(section)
    prefix = "" if section is config.RunConfig else _section_name(section) + "."
    for item in dataclasses.fields(section):
        path = prefix + item.name
        if path in field_types():
            flags = tuple(
                f"--{flag}" for flag, target in FLAGS.items() if f"{target.split('=')[0]}.".startswith(f"{path}.")
            )
            yield Option(path, _kind(field_types()[path]), _default(item), texts[item.name], flags)


def sections() -> list[type]:
    """The sections' dataclasses in the order of `RunConfig`, then `RunConfig` itself."""
    kinds = typing.get_type_hints(config.RunConfig).values()
    return [*(kind for kind in kinds if dataclasses.is_dataclass(kind)), config.RunConfig]  # type: ignore[list-item]


def help_text() -> str:
    """What `--help` prints."""
    lines = [HELP_HEAD]
    for option in (option for section in sections() for option in options(section)):
        lines.append(f"  {', '.join((option.path, *option.flags))}  ({option.default}: {option.kind})")
        lines.append(f"      {option.text}")
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    parts = [MARKDOWN_HEAD]
    for section in sections():
        title = "Top level" if section is config.RunConfig else _section_name(section)
        rows = [
            f"## {title}\n\n{inspect.getdoc(section)}\n",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for option in options(section):
            names = "<br>".join(f"`{name}`" for name in (option.path, *option.flags))
            kind = option.kind.replace("|", "\\|")
            rows.append(f"| {names} | {kind} | `{option.default}` | {option.text.replace('|', '&#124;')} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _section_name(section: type) -> str:
    return section.__name__.removesuffix("Config").lower()


def _field_texts(section: type) -> dict[str, str]:
    """Field -> the string that stands under it in the source."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    texts: dict[str, str] = {}
    for field, text in pairwise(typing.cast("ast.ClassDef", tree).body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str() as words)):
                texts[name] = " ".join(words.split())
    return texts


def _kind(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) in (dict, Mapping):
        return "mapping"
    if typing.get_origin(annotation) is tuple:
        return f"list of {_kind(arguments[0])}"
    if arguments:
        return " | ".join("null" if item is type(None) else _kind(item) for item in arguments)
    return annotation.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    match field.default:
        case dataclasses.MISSING:
            made = field.default_factory is not dataclasses.MISSING and not field.default_factory()
            return "empty" if made else "required"
        case None | bool():
            return {None: "null", True: "true", False: "false"}[field.default]
        case tuple() as items:
            return ",".join(items) or "none"
        case default:
            return str(default) or "empty"
