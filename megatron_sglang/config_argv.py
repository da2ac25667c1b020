"""Sorts the words of a command line by whom they are for: this package, SGLang, or Megatron. Reads no values.

    --config FILE --dry-run       the invocation itself
    section.field=value           an override
    --lora-rank 32                a short flag (`FLAGS`)
    --lora.rank 32                any own field
    --sglang-mem-fraction-static  a field of SGLang's ServerArgs
    --lr 1e-5                     everything else must be Megatron's

Any other word is a `ConfigError` with a suggestion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sglang.config_check import SECTIONS, SGLANG_RESERVED, field_types, known_options, suggest, text_options
from megatron_sglang.errors import ConfigError

FLAGS = {
    "hf-model": "model.hf_path",
    "hf-checkpoint": "model.hf_path",
    "random-weights": "model.random_weights=true",
    "lora-rank": "lora.rank",
    "lora-alpha": "lora.alpha",
    "target-modules": "lora.targets",
    "prompt-data": "data.train",
    "eval-prompt-data": "data.eval",
    "input-key": "data.columns.prompt",
    "label-key": "data.columns.label",
    "metadata-key": "data.columns.metadata",
    "rollout-max-prompt-len": "data.max_prompt_tokens",
    "rollout-engine": "rollout.engine",
    "rollout-batch-size": "rollout.prompts_per_batch",
    "n-samples-per-prompt": "rollout.samples_per_prompt",
    "rollout-temperature": "rollout.temperature",
    "rollout-top-p": "rollout.top_p",
    "rollout-top-k": "rollout.top_k",
    "rollout-max-response-len": "rollout.max_new_tokens",
    "rollout-stop": "rollout.stop",
    "num-rollout": "rollout.batches",
    "rm-type": "reward.name",
    "unsafe-local-sandbox": "reward.sandbox=unsafe-local",
    "advantage-estimator": "algo.loss",
    "eps-clip": "algo.clip_low",
    "eps-clip-high": "algo.clip_high",
    "disable-grpo-std-normalization": "algo.advantage=dr_grpo",
    "kl-loss-coef": "algo.kl_coef",
    "kl-loss-type": "algo.kl_estimator",
    "entropy-coef": "algo.entropy_coef",
    "use-tis": "algo.tis=token",
    "tis-clip": "algo.tis_cap",
    "rollout-num-gpus-per-engine": "engine.tp_size",
    "rollout-mode": "rollout.mode",
    "colocate": "rollout.mode=colocated",
    "over-sampling": "rollout.over_sampling",
    "partial-rollout": "rollout.stragglers=resume",
    "mask-offpolicy-in-partial-rollout": "rollout.stragglers=resume_masked",
    "dynamic-sampling": "rollout.dynamic_sampling=true",
    "rollout-external-engine-addrs": "engine.external",
    "weight-sync": "sync.method",
    "update-weight-buffer-size": "sync.bucket_bytes",
    "max-tokens-per-gpu": "megatron.max-seqlen-per-dp-cp-rank",
    "seed": "seed",
    "grpo-prompts-per-step": "rollout.prompts_per_batch",
    "grpo-group-size": "rollout.samples_per_prompt",
    "grpo-clamp-eps-lower": "algo.clip_low",
    "grpo-clamp-eps-upper": "algo.clip_high",
    "grpo-kl-beta": "algo.kl_coef",
    "grpo-entropy-term-weight": "algo.entropy_coef",
    "rl-default-temperature": "rollout.temperature",
    "rl-default-top-p": "rollout.top_p",
    "rl-default-top-k": "rollout.top_k",
}
"""Short flags, named as users of slime and of Megatron's own RL know them -> the field, or `field=value` for a flag
that takes no value."""

_OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})\.[\w-]+=|seed=")


@dataclass(slots=True)
class Words:
    """A command line, sorted. Overrides are `section.field=value` texts; Megatron's values stay text."""

    config_file: str | None = None
    dry_run: bool = False
    overrides: list[str] = field(default_factory=list)
    """As the user wrote them."""
    flags: list[str] = field(default_factory=list)
    """From flags; they win over `overrides`."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Flag without dashes -> True, False, a text, or a list of texts."""


def sort_words(argv: Sequence[str]) -> Words:
    """Sort a command line (without the program's name)."""
    words, rest = Words(), list(argv)
    while rest:
        word = rest.pop(0)
        if _OVERRIDE.match(word):
            words.overrides.append(word)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if equals:
                rest.insert(0, value)
            _take_flag(words, name, rest, glued=bool(equals))
        else:
            known = [*field_types(), *SECTIONS]
            raise ConfigError(
                f"argument {word!r} is neither a --flag nor section.field=value{suggest(word.split('=')[0], known)}"
            )
    return words


def _take_flag(words: Words, name: str, rest: list[str], *, glued: bool) -> None:
    """Take the values of flag `name` off `rest` and file them; `glued`: the flag came as --name=value."""
    if name == "config":
        words.config_file = _take_values(name, "1", rest, glued)
    elif name == "dry-run":
        words.dry_run = _take_values(name, "0", rest, glued)
    elif name in FLAGS or name in field_types():
        target = FLAGS.get(name, name)
        if "=" in target:
            _take_values(name, "0", rest, glued)
            words.flags.append(target)
        else:
            words.flags.append(f"{target}={_take_values(name, '1', rest, glued)}")
    elif name.startswith("sglang-"):
        option = name.removeprefix("sglang-").replace("-", "_")
        count = known_options("sglang").get(option)
        if count is None:
            dashed = [known.replace("_", "-") for known in known_options("sglang")]
            owners = {known.replace("_", "-"): f"--{owner}" for known, owner in SGLANG_RESERVED.items()}
            hint = suggest(name.removeprefix("sglang-"), dashed, "--sglang-", owners)
            raise ConfigError(f"--{name} is not a field of SGLang's ServerArgs{hint}")
        value = _take_values(name, count, rest, glued)
        words.flags.append(f"sglang.{option}={value if isinstance(value, str) else _as_yaml(option, value)}")
    elif name in known_options("megatron"):
        words.megatron[name] = _take_values(name, known_options("megatron")[name], rest, glued)
    elif known_options("megatron").get(name.removeprefix("no-")) == "bool":
        words.megatron[name.removeprefix("no-")] = not _take_values(name, "0", rest, glued)
    else:
        known = [*FLAGS, *field_types(), *known_options("megatron"), "config", "dry-run"]
        raise ConfigError(f"--{name} is not a flag of this package or of Megatron{suggest(name, known, '--')}")


def _as_yaml(option: str, value: bool | list[str]) -> str:
    """Several values as a list, numbers bare and texts in quotes; a switch as true."""
    if isinstance(value, bool):
        return "true"
    return json.dumps(value) if f"sglang.{option}" in text_options() else f"[{','.join(value)}]"


def _take_values(name: str, count: str, rest: list[str], glued: bool) -> Any:
    """True for a flag without values, a text for one value, else a list of texts."""
    if count in ("0", "bool"):
        if glued:
            raise ConfigError(f"--{name}={rest[0]}: the flag takes no value; write --{name} alone")
        return True
    most = {"*": len(rest), "+": len(rest)}.get(count) or (1 if glued else int(count) if count.isdigit() else 0)
    values: list[str] = []
    while rest and len(values) < most and not (not glued and (rest[0].startswith("--") or _OVERRIDE.match(rest[0]))):
        values.append(rest.pop(0))
    if len(values) < (0 if count == "*" else 1 if count == "+" else int(count)):
        raise ConfigError(f"--{name} got {len(values)} values; expected {count}")
    return values[0] if count == "1" else values
