"""What a `RunConfig` must fulfil, what follows from it, and the option names of Megatron and SGLang.

`check` raises a `ConfigError` for what cannot work and returns warnings for what is probably not meant; `resolve`
returns a new config with the values that follow from others; `megatron_argv` writes what Megatron's parser gets.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, Literal

from megatron_sglang import placement
from megatron_sglang.config import LoraConfig, LoraTarget, RewardConfig, RouterPolicy, RunConfig
from megatron_sglang.config_sizes import BUDGET, PARALLEL, check_batches, megatron_int, packed_tokens, parallel_size
from megatron_sglang.errors import ConfigError
from megatron_sglang.stops import StopMatcher

SECTIONS = tuple(item.name for item in dataclasses.fields(RunConfig) if item.name != "seed")

SGLANG_RESERVED = {
    "model_path": "model.hf_path",
    "dtype": "model.dtype",
    "tp_size": "engine.tp_size",
    "enable_deterministic_inference": "engine.deterministic",
    "random_seed": "seed",
}
"""ServerArgs fields that are written from our own; the engine refuses the others that it owns."""

ROUTER = "router_policy"
"""Under `sglang`, though no field of ServerArgs: the flag --router-policy of `sglang_router.launch_server`."""

MEGATRON_RESERVED = {
    "seed": "seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""Megatron's arguments that are written from our own."""

MEGATRON_RL = ("rl-", "grpo-", "langrl-", "perform-rl-step", "refit-method")
"""How the arguments of Megatron's own RL loop begin; it does not run here, so they would have no effect."""

COLUMNS = ("prompt", "label", "metadata")
"""Whose names data.columns may give."""

REWARDS = ("auto", "fim_python", "fim_lean")
"""Verifiers by name, besides functions of the user's own."""

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("data.max_prompt_tokens algo.max_bad_steps", lambda v: v > 0, "above 0"),
    ("algo.tis_cap", lambda v: v >= 1, "1 or above: less would cut down even equal probabilities"),
    (
        "rollout.prompts_per_batch rollout.temperature rollout.max_new_tokens rollout.batches",
        lambda v: v > 0,
        "above 0",
    ),
    ("reward.workers reward.timeout_s reward.memory_mb sync.bucket_bytes", lambda v: v > 0, "above 0"),
    ("engine.start_timeout_s engine.request_timeout_s engine.update_timeout_s", lambda v: v > 0, "above 0"),
    ("rollout.eval_interval rollout.eval_samples algo.entropy_coef seed", lambda v: v >= 0, "0 or above"),
    ("algo.kl_coef", lambda v: v is None or v >= 0, "0 or above, or null"),
    ("algo.clip_low", lambda v: v is None or 0 < v <= 1, "in (0, 1], or null for the default of algo.loss"),
    ("algo.clip_high", lambda v: v is None or v > 0, "above 0, or null for the default of algo.loss"),
    ("rollout.over_sampling", lambda v: v >= 1, "1.0 or above"),
    ("engine.tp_size", lambda v: v is None or v > 0, "above 0, or null for all trainer ranks of the node"),
    ("rollout.top_p", lambda v: 0 < v <= 1, "in (0, 1]; 1.0 keeps all tokens"),
    ("rollout.top_k", lambda v: v == -1 or v > 0, "-1 for all tokens, or above 0"),
    ("rollout.samples_per_prompt", lambda v: v > 1, "2 or above: advantages compare the members of a group"),
)
"""Fields (separated by blanks), what their value must fulfil, the same in words."""


@cache
def known_options(section: Literal["megatron", "sglang"]) -> Mapping[str, str]:
    """Option name -> its number of values ("0", "1", "3", "*", "+"; "bool": --x and --no-x) in the pinned version."""
    table = {"megatron": "megatron_flags.txt", "sglang": "sglang_fields.txt"}[section]
    more = {ROUTER: "1"} if section == "sglang" else {}
    return {name: count for name, count, *_ in _table(table)} | more


def _table(name: str) -> list[list[str]]:
    lines = resources.files("megatron_sglang").joinpath(name).read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


@cache
def text_options() -> Mapping[str, bool]:
    """Options that are texts, as `section.field`, -> whether they are lists of them."""
    own = {path: kind is not str for path, kind in field_types().items() if kind in (str, tuple[str, ...])}
    columns = {f"data.columns.{name}": False for name in COLUMNS}
    sglang = {f"sglang.{name}": count == "*" for name, count, *kind in _table("sglang_fields.txt") if kind}
    return own | columns | sglang


@cache
def field_types() -> Mapping[str, Any]:
    """Every own field as `section.field` -> its type; the sections and the two pass-through dicts are not in it."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            found.update({f"{name}.{key}": item for key, item in typing.get_type_hints(kind).items()})
        elif name not in ("megatron", "sglang"):
            found[name] = kind
    return found


def in_one_spelling(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a section with dashes for Megatron and underscores for SGLang, as the names are known here: spelled
    both ways one of them would stand twice."""
    old, new = {"megatron": "_-", "sglang": "-_"}.get(section, "--")
    return {str(name).replace(old, new): value for name, value in options.items()}


def suggest(name: str, known: Iterable[str], prefix: str = "", owners: Mapping[str, str] | None = None) -> str:
    """'; did you mean ...?', or nothing where no known name is near, nor one of which `name` is the first part.

    owners: known name -> what is to be set in its place.
    """
    words = list(known)
    near = get_close_matches(name, words, n=3) or [word for word in words if word.startswith((f"{name}_", f"{name}-"))]
    shown = [(owners or {}).get(word, prefix + word) for word in near[:3]]
    return f"; did you mean {' or '.join(shown)}?" if shown else ""


def resolve(config: RunConfig, *, local_world_size: int) -> RunConfig:
    """A new config with the engine's size and those of Megatron's arguments that follow from our own filled in.

    `local_world_size`: trainer ranks on this node. What the user set is never overwritten, but for the micro-batch-size
    of packed micro-batches, which has no meaning.
    """
    samples = config.rollout.samples
    step_samples = megatron_int(config, "global-batch-size", samples)
    derived = {
        "global-batch-size": step_samples,
        "train-iters": config.rollout.batches * samples // max(step_samples, 1),
        "seq-length": config.longest_sample,
        "expert-tensor-parallel-size": 1,
    }
    # Micro-batches by tokens have no fixed number of samples; Megatron still counts a train step's samples by one.
    packed = {"micro-batch-size": 1} if megatron_int(config, BUDGET, 0) else {}
    return dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, tp_size=config.engine.tp_size or local_world_size),
        megatron=derived | {name: given for name, given in config.megatron.items() if given is not None} | packed,
    )


def check(config: RunConfig, *, local_world_size: int | None = None, trains: bool = True) -> tuple[str, ...]:
    """Raise `ConfigError` for what cannot work; the warnings otherwise. Engine sizes need `local_world_size`. trains:
    False where weights are read and written, and nothing computed."""
    _check_ranges(config)
    checked_lora(config.lora)
    _check_pass_through(config)
    for kind in PARALLEL:
        parallel_size(config, kind)
    _check_adapters(config, trains)
    _check_router(config)
    _check_stop(config)
    _check_fed(config)
    _check_reward(config.reward)
    check_batches(config)
    if local_world_size is not None:
        _check_engine(config, local_world_size)
    return tuple(_warnings(config))


def megatron_argv(config: RunConfig) -> list[str]:
    """`config.megatron` as Megatron's parser reads it; a false switch is left out, or --no-x where that exists."""
    argv = [f"--seed={config.seed}", *(["--bf16"] if config.model.dtype == "bfloat16" else [])]
    for name, given in config.megatron.items():
        count = known_options("megatron")[name]
        if given is None or (given is False and count == "0"):
            continue
        if isinstance(given, bool):
            argv.append(f"--{name}" if given else f"--no-{name}")
        else:
            argv += [f"--{name}", *map(str, given if isinstance(given, list) else [given])]
    return argv


def checked_lora(lora: LoraConfig) -> LoraConfig:
    """`lora` itself, whatever it was made of; `ConfigError` for what adapts nothing."""
    known = typing.get_args(LoraTarget)
    if unknown := [name for name in lora.targets if name not in known]:
        raise ConfigError(f"lora.targets names {', '.join(map(repr, unknown))}; expected some of {','.join(known)}")
    if not lora.targets:
        raise ConfigError(f"lora.targets is empty, so nothing would be trained; set it to some of {','.join(known)}")
    for name in ("rank", "alpha"):
        if not (given := getattr(lora, name)) > 0:
            raise ConfigError(f"lora.{name}={given}; expected above 0")
    return lora


def split_targets(words: Iterable[str]) -> tuple[LoraTarget, ...]:
    """Names with blanks or commas between them; `checked_lora` says which of them are none."""
    names = [name.strip() for word in words for name in word.split(",")]
    return typing.cast("tuple[LoraTarget, ...]", tuple(name for name in names if name))


def _check_ranges(config: RunConfig) -> None:
    for paths, fulfils, expected in _RANGES:
        for path in paths.split():
            section, _, name = path.rpartition(".")
            given = getattr(getattr(config, section) if section else config, name)
            if not fulfils(given):
                raise ConfigError(f"{path}={given}; expected {expected}")
    if config.algo.loss.startswith("gspo") and config.algo.aggregation not in ("auto", "sequence_mean"):
        raise ConfigError(
            f"algo.aggregation={config.algo.aggregation} with algo.loss={config.algo.loss}, whose ratios are those of "
            "sequences; set it to sequence_mean, or algo.loss to grpo"
        )
    if config.rollout.eval_interval and not config.data.eval:
        raise ConfigError(
            f"rollout.eval_interval={config.rollout.eval_interval} but data.eval is empty; set --eval-prompt-data FILE"
        )


def _check_pass_through(config: RunConfig) -> None:
    for section, reserved in (("megatron", MEGATRON_RESERVED), ("sglang", SGLANG_RESERVED)):
        known = known_options(section)
        for name, given in getattr(config, section).items():
            if name not in known:
                hint = suggest(name, known, f"{section}.", reserved)
                raise ConfigError(f"{section}.{name} is not an option of the pinned {section}{hint}")
            if name in reserved:
                raise ConfigError(f"{section}.{name}={given} is not yours to set; it follows from {reserved[name]}")
            if section == "megatron" and name.startswith(MEGATRON_RL):
                raise ConfigError(
                    f"megatron.{name} is of Megatron's own RL loop, which this package replaces; leave it out"
                )
    if unknown := config.data.columns.keys() - set(COLUMNS):
        raise ConfigError(f"data.columns names {', '.join(sorted(unknown))}; expected {' or '.join(COLUMNS)}")
    for name, given in config.megatron.items():
        is_switch = known_options("megatron")[name] in ("0", "bool")
        if given is not None and isinstance(given, bool) != is_switch:
            wanted = "true or false" if is_switch else "a value (quote words that YAML takes for one, such as 'on')"
            raise ConfigError(f"megatron.{name}={given!r}; expected {wanted}")


def _check_adapters(config: RunConfig, trains: bool) -> None:
    """What Megatron-Bridge 0.6.2 gets wrong without a word."""
    if (size := megatron_int(config, "expert-tensor-parallel-size", 1)) != 1:
        raise ConfigError(
            f"expert-tensor-parallel-size={size}: adapters of experts are wrong above 1 in Megatron-Bridge 0.6.2; set "
            "it to 1 and raise expert-model-parallel-size instead"
        )
    if trains and "router" in config.lora.targets and (size := parallel_size(config, "tensor-model")) != 1:
        raise ConfigError(
            f"tensor-model-parallel-size={size} with router among lora.targets: above 1 its adapter in Megatron-Bridge "
            "0.6.2 mixes tokens of different ranks; leave one of the two out"
        )


def _check_router(config: RunConfig) -> None:
    policies = typing.get_args(RouterPolicy)
    if (given := config.sglang.get(ROUTER)) not in (None, *policies):
        raise ConfigError(f"sglang.{ROUTER}={given}; expected {' or '.join(policies)}; without it there is no router")


def _check_stop(config: RunConfig) -> None:
    StopMatcher(config.rollout.stop, str)
    if config.rollout.stop and config.replays_routing:
        raise ConfigError(
            f"rollout.stop={list(config.rollout.stop)} with --moe-enable-routing-replay: texts cut a completion before "
            "its end, where SGLang tells the experts; leave one of the two out"
        )


def _check_fed(config: RunConfig) -> None:
    """Whoever feeds a run decides what its batches are made of."""
    rollout = config.rollout
    if rollout.environment.get("name") != "feed":
        return
    if rollout.stop:
        raise ConfigError(
            f"rollout.stop={list(rollout.stop)} in a run whose batches are sampled elsewhere; give the texts to "
            "whoever samples"
        )
    for name, nothing in (("over_sampling", 1.0), ("dynamic_sampling", False)):
        if (given := getattr(rollout, name)) != nothing:
            raise ConfigError(
                f"rollout.{name}={given} has no effect in a run whose batches are sampled elsewhere; leave it out, and "
                "have whoever samples choose the groups"
            )


def _check_reward(reward: RewardConfig) -> None:
    """A function of the user's own runs as it is, in a process of its own."""
    if not reward.name.startswith("function:"):
        if reward.name not in REWARDS:
            raise ConfigError(
                f"reward.name={reward.name} is unknown{suggest(reward.name, REWARDS)}; expected {', '.join(REWARDS)} "
                "or function:PACKAGE.MODULE.FUNCTION"
            )
        if reward.name == "fim_lean" and not reward.lean_project:
            raise ConfigError(
                "reward.name=fim_lean but reward.lean_project is empty; set it to a Lake project's folder"
            )
        return
    for name in ("binary", "sandbox", "memory_mb", "lean_project"):
        if (given := getattr(reward, name)) != getattr(RewardConfig(), name):
            raise ConfigError(f"reward.{name}={given} has no effect on reward.name={reward.name}; leave it out")


def _check_engine(config: RunConfig, ranks: int) -> None:
    tp_size = config.engine.tp_size or ranks
    if config.rollout.mode != "split" and not config.engine.external:
        placement.engines(ranks, tp_size)
    ep_size = config.sglang.get("ep_size", 1)
    if not isinstance(ep_size, int) or ep_size < 1 or tp_size % ep_size:
        raise ConfigError(f"sglang.ep_size={ep_size!r} does not divide engine.tp_size={tp_size}; set it to a divisor")


def _warnings(config: RunConfig) -> Iterable[str]:
    algo, rollout = config.algo, config.rollout
    highest = max(algo.clip_low or 0, algo.clip_high or 0)
    if algo.loss.startswith("gspo") and highest >= 0.05:
        yield (
            f"algo.clip_low={algo.clip_low}, algo.clip_high={algo.clip_high} suit the ratios of tokens (GRPO); those "
            "of sequences stay nearer to 1, GSPO's authors use 3e-4 and 4e-4"
        )
    if 0 < (budget := packed_tokens(config)) < config.longest_sample:
        yield (
            f"{BUDGET} times context-parallel-size is {budget} tokens, a sample may have {config.longest_sample} and "
            "then is a micro-batch of its own, larger than that"
        )
    if rollout.top_p < 1 or rollout.top_k != -1:
        yield "rollout.top_p/top_k cut the sampler's distribution; the trainer's ratios are taken against the uncut one"
    if rollout.stragglers != "abort" and rollout.over_sampling == 1:
        yield (
            f"rollout.stragglers={rollout.stragglers} has no effect: with rollout.over_sampling=1.0 every completion "
            "is waited for, so none is left to resume"
        )
    if algo.kl_coef and algo.kl_estimator == "k1":
        yield (
            f"algo.kl_estimator=k1 holds nothing near the base model, whatever algo.kl_coef={algo.kl_coef}: as a loss "
            "its gradient is 0 in expectation; take k2 or k3"
        )
    if config.data.eval and rollout.environment.get("name") == "feed":
        yield "data.eval has no effect: a run whose batches are sampled elsewhere leaves evaluation to whoever samples"
    if algo.shuffle_rewards:
        yield "algo.shuffle_rewards permutes the rewards: this is the control experiment, nothing should be learned"
