"""Sizes that Megatron's options give a run: of parallel groups, batches and micro-batches. Pure."""

from __future__ import annotations

from megatron_sglang.config import RunConfig
from megatron_sglang.errors import ConfigError

PARALLEL = ("tensor-model", "context", "pipeline-model", "expert-model")
"""Of what Megatron's arguments --KIND-parallel-size are."""

BUDGET = "max-seqlen-per-dp-cp-rank"
"""Megatron's argument for the tokens that a rank can train on at a time; here, of a packed micro-batch."""


def parallel_size(config: RunConfig, kind: str) -> int:
    """Megatron's parallel size of a kind (tensor-model, context, pipeline-model, expert-model); 1 where it is not
    given."""
    name = f"{kind}-parallel-size"
    if (size := megatron_int(config, name, 1)) < 1:
        raise ConfigError(f"megatron.{name}={size}; expected 1 or above")
    return size


def packed_tokens(config: RunConfig) -> int:
    """Of a micro-batch on all its context-parallel ranks; 0 where samples are padded."""
    return megatron_int(config, BUDGET, 0) * parallel_size(config, "context")


def megatron_int(config: RunConfig, name: str, default: int) -> int:
    """The whole number that the option `name` of Megatron has, or `default` where it is not given; ConfigError for
    anything else."""
    given = config.megatron.get(name)
    try:
        return default if given is None else int(given)
    except (TypeError, ValueError):
        raise ConfigError(f"megatron.{name}={given!r}; expected a whole number") from None


def check_batches(config: RunConfig) -> None:
    """`ConfigError` unless rollout batches are whole train steps, as many as there are iterations, and a sample fits in
    Megatron's sequence."""
    rollout, samples = config.rollout, config.rollout.samples
    step_samples = megatron_int(config, "global-batch-size", samples)
    if step_samples < 1 or samples % step_samples:
        raise ConfigError(
            f"global-batch-size={step_samples} does not divide the {samples} samples of a rollout batch "
            f"({rollout.prompts_per_batch} prompts x {rollout.samples_per_prompt}); set it to {samples} or a divisor"
        )
    iterations = rollout.batches * samples // step_samples
    if (given := megatron_int(config, "train-iters", iterations)) != iterations:
        raise ConfigError(
            f"train-iters={given} but {rollout.batches} rollout batches of {samples} samples make {iterations} "
            f"iterations of {step_samples}; leave train-iters out or change --num-rollout"
        )
    if (given := megatron_int(config, BUDGET, 0)) < 0:
        raise ConfigError(f"{BUDGET}={given}; expected the tokens of a packed micro-batch, or 0 to pad")
    longest = config.longest_sample
    if (given := megatron_int(config, "seq-length", longest)) < longest:
        raise ConfigError(
            f"seq-length={given} is shorter than data.max_prompt_tokens={config.data.max_prompt_tokens} "
            f"plus rollout.max_new_tokens={rollout.max_new_tokens}; set it to {longest} or more"
        )


def check_micro_batches(config: RunConfig, replicas: int) -> None:
    """`ConfigError` unless a train step is whole micro-batches on each of `replicas` data-parallel ranks."""
    step_samples = megatron_int(config, "global-batch-size", config.rollout.samples)
    size = megatron_int(config, "micro-batch-size", 1)
    if size < 1 or step_samples % (size * replicas):
        each, rest = divmod(step_samples, replicas)
        remedy = "change the number of ranks" if rest else f"set it to {each} or a divisor of that"
        raise ConfigError(
            f"--micro-batch-size={size} times {replicas} data-parallel ranks does not divide --global-batch-size="
            f"{step_samples}; {remedy}, or change rollout.prompts_per_batch"
        )
