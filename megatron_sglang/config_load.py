"""YAML files and command lines in, one checked `RunConfig` out.

    python pretrain_gspo.py --config conf/x.yaml  algo.loss=grpo  --lora-rank 32

Each later source wins: the defaults, the YAML file (which holds only differences), overrides, flags. Unknown names
anywhere are a `ConfigError` with a suggestion. `config_argv.py` says what a command line may contain.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import BaseLoader, YAMLError, load

from megatron_sglang.config import RunConfig
from megatron_sglang.config_argv import sort_words
from megatron_sglang.config_check import (
    check,
    in_one_spelling,
    known_options,
    megatron_argv,
    resolve,
    suggest,
    text_options,
)
from megatron_sglang.config_docs import help_text
from megatron_sglang.errors import ConfigError

ALIASES = {"sync.method=merged": "auto"}
"""A choice as others call it -> what it is called here."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """What one command line asks for."""

    config: RunConfig
    """Resolved: what follows from other values is filled in."""
    dry_run: bool
    """Print the resolved configuration and stop."""
    warnings: tuple[str, ...]
    """What can run but is probably not meant; one sentence each."""

    @property
    def megatron_argv(self) -> list[str]:
        """What Megatron's own parser gets."""
        return megatron_argv(self.config)


def split_argv(argv: Sequence[str], *, local_world_size: int | None = None) -> Invocation:
    """Read a command line (without the program's name). Raises `ConfigError`; ends the program after `--help`.

    `local_world_size`: trainer ranks on this node; None: what torchrun says, 1 where it is silent.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit
    words = sort_words(argv)
    sources = (_from_yaml(words.config_file), from_overrides(words.overrides), from_overrides(words.flags))
    config = _build(RunConfig, _merge(*sources, OmegaConf.create({"megatron": words.megatron})), "")
    if local_world_size is None:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    config = resolve(config, local_world_size=local_world_size)
    return Invocation(config, words.dry_run, check(config, local_world_size=local_world_size))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with `section.field=value` overrides, checked but not resolved."""
    config = _build(RunConfig, _merge(_from_yaml(path), from_overrides(overrides)), "")
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """YAML text that `load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _from_yaml(path: str | Path | None) -> DictConfig:
    if path is None:
        return OmegaConf.create()
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; name an existing YAML file") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {path} holds a {type(loaded).__name__}; expected a mapping of sections")
    return loaded


def from_overrides(overrides: Sequence[str]) -> DictConfig:
    """The sections that words such as section.field=value make. `ConfigError` for one that cannot be read."""
    tree = OmegaConf.create()
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no value; write section.field=value")
        if path.startswith("sglang."):
            path = path.replace("-", "_")
        try:
            if path in text_options():
                OmegaConf.update(tree, path, _text(path, value))
            else:
                tree.merge_with_dotlist([override])
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"the override {override} cannot be read: {error}") from error
    return tree


def _text(path: str, value: str) -> str | list[Any] | None:
    """The value of an option that is text: as it stands, since YAML makes another text of 0123, 1e3, off or a # b.

    Read as YAML are null, a text in quotes, and [a, b] where a list is meant; its items stay texts.
    """
    if value == "null" and path != "rollout.stop":
        return None
    quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    listed = text_options()[path] and value.startswith("[")
    if quoted or listed:
        try:
            read = load(value, BaseLoader)
        except YAMLError:
            return value
        return read if isinstance(read, list if listed else str) else value
    return value


def _merge(*sources: DictConfig) -> dict[str, Any]:
    """Later sources win. Names of pass-through options are brought to one spelling first."""
    for source in sources:
        for section in ("megatron", "sglang"):
            options = source.get(section)
            if options is None:
                continue
            if not isinstance(options, DictConfig):
                raise ConfigError(f"{section}={options!r} is not a section; write its options as {section}.NAME=value")
            plain = typing.cast("dict[str, Any]", OmegaConf.to_container(options, resolve=False))
            source[section] = in_one_spelling(section, plain)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*sources), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be put together: {error}") from error
    return typing.cast("dict[str, Any]", merged)


def _build[T](cls: type[T], given: Any, path: str) -> T:
    """Make a dataclass from plain data; every name and type is checked."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}={given!r} is not a section; write its fields as {path}.NAME=value")
    prefix = f"{path}." if path else ""
    kinds = typing.get_type_hints(cls)
    for name in given:
        if name not in kinds:
            known = f"; {path or 'the top level'} has {', '.join(kinds)}"
            own = f"; it is SGLang's own: sglang.{name}" if path == "engine" and name in known_options("sglang") else ""
            hint = own or suggest(str(name), kinds, prefix) or known
            raise ConfigError(f"{prefix}{name} is not an option{hint}")
    # A required section (model, data) that is absent is built from nothing: then its missing field is what is named.
    values = {
        name: _convert(given.get(name, {}), kind, prefix + name)
        for name, kind in kinds.items()
        if name in given or dataclasses.is_dataclass(kind)
    }
    for item in dataclasses.fields(typing.cast("Any", cls)):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and values.get(item.name) in (None, ""):
            raise ConfigError(f"{prefix}{item.name} is not set; give it in the YAML file or as --{prefix}{item.name}")
    return cls(**values)


def _items(given: Any, path: str) -> list[Any]:
    """Of a list, or of a text with commas between them. A text may have a comma, or be what YAML takes for nothing."""
    texts = path == "rollout.stop"
    if isinstance(given, list):
        return given
    if given == "" or (given is None and not texts):
        return []
    if isinstance(given, str):
        return [given] if texts else [item.strip() for item in given.split(",")]
    raise ConfigError(f"{path}={given!r}; expected a list, [a, b]; put quotes around what YAML reads as something else")


def _convert(given: Any, kind: Any, path: str) -> Any:
    """`given` as a value of type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast("type", kind), given, path)
    if origin is types.UnionType:
        inner = next(option for option in arguments if option is not types.NoneType)
        return None if given is None else _convert(given, inner, path)
    if origin is Literal:
        # YAML reads a bare off as false.
        given = "off" if given is False and "off" in arguments else ALIASES.get(f"{path}={given}", given)
        if given in arguments:
            return given
        raise ConfigError(f"{path}={given!r} is not allowed; set it to {' or '.join(map(str, arguments))}")
    if origin is tuple:
        return tuple(_convert(item, arguments[0], path) for item in _items(given, path))
    if origin is dict and given is None:
        return {}
    if kind is str and not isinstance(given, (dict, list, bool)):
        return "" if given is None else str(given)
    if kind is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, origin or kind) and isinstance(given, bool) == (kind is bool):
        return given
    raise ConfigError(f"{path}={given!r} is a {type(given).__name__}; expected {getattr(kind, '__name__', kind)}")
