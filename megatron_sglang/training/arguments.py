"""Megatron's arguments for the model in a Hugging Face folder, and the checks Megatron does not make itself.

The user gives Megatron's flags for parallelism, batch, optimizer, schedule, checkpoints; the architecture comes from
config.json through Megatron-Bridge, so that it is written down once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_sglang import config_check
from megatron_sglang.config import RunConfig
from megatron_sglang.config_sizes import check_micro_batches
from megatron_sglang.cpu import trainer as cpu_room
from megatron_sglang.errors import ConfigError, DataError, SetupError
from megatron_sglang.feed.sampler import Feed
from megatron_sglang.plan.shapes import hub_shapes
from megatron_sglang.training import hf_folder

MEGATRON_CORE = "0.19.2"
MEGATRON_BRIDGE = "0.6.2"

# What only a GPU has: fused kernels, Transformer Engine. The loss is the same without.
_CPU_FLAGS = [
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--attention-backend=unfused",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
]

# Ours to decide: the plugin feeds the batches itself, guards against NaN itself, and counts what it divides by.
_PLUGIN_FLAGS = [
    "--dataloader-type=external",
    "--tokenizer-type=NullTokenizer",
    "--eval-iters=0",
    "--eval-interval=1000000000",
    "--calculate-per-token-loss",
    "--no-check-for-nan-in-loss-and-grad",
    "--no-create-attention-mask-in-dataloader",
    "--attention-dropout=0",
    "--hidden-dropout=0",
    "--use-distributed-optimizer",
    "--dist-ckpt-optim-fully-reshardable",
    "--ckpt-format=torch_dist",
    "--rerun-mode=disabled",
    "--log-interval=1000000000",
]


def fields_of(flags: Iterable[str]) -> dict[str, str]:
    """Name under which Megatron keeps a flag's value, and its model's configuration too -> the flag, of those given.
    Not always the flag's own: --norm-epsilon is layernorm_epsilon, --no-rope-fusion apply_rope_fusion."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    kept = {option: action.dest for action in parser._actions for option in action.option_strings}
    return {kept.get(f"--{flag}", flag.replace("-", "_")): flag for flag in flags}


def check_versions() -> None:
    """SetupError unless megatron-core and megatron-bridge are the versions this plugin was written against."""
    for package, expected in (("megatron-core", MEGATRON_CORE), ("megatron-bridge", MEGATRON_BRIDGE)):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != expected:
            raise SetupError(
                f"{package} is {found}, but the plugin is written against {expected}; "
                f"install it with `make install` or `uv pip install {package}=={expected}`"
            )


def load_bridge(hf_path: str) -> Any:
    """The Megatron-Bridge of a local Hugging Face folder; DataError when it is missing, corrupt or unknown."""
    from megatron.bridge import AutoBridge

    hf_folder.check(hf_path, weights=False)
    try:
        bridge = AutoBridge.from_hf_pretrained(hf_path, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(
            f"Megatron-Bridge cannot read {hf_path}: {type(error).__name__}: {error}; "
            "expected a model of a family that it knows (docs of Megatron-Bridge 0.6.2)"
        ) from error
    if not any(Path(hf_path).glob("*.safetensors")):
        _tell_names(bridge, Path(hf_path))
    return bridge


def _tell_names(bridge: Any, folder: Path) -> None:
    """Bridge asks the weights' files for the names of tensors, to export too; for random weights there are no files."""
    from megatron.bridge.models.hf_pretrained.state import DictStateSource, StateDict

    with contextlib.suppress(DataError):  # transformers does not know the model; Bridge's own error says more
        tensors = {name: torch.empty(shape, device="meta") for name, shape in hub_shapes(folder).items()}
        bridge.hf_pretrained._state_dict_accessor = StateDict(DictStateSource(tensors))


def architecture_flags(provider: Any) -> list[str]:
    """Megatron's flags that describe `provider`'s model, for Megatron's own checks and counters."""
    flags = {
        "num-layers": provider.num_layers,
        "hidden-size": provider.hidden_size,
        "ffn-hidden-size": provider.ffn_hidden_size,
        "num-attention-heads": provider.num_attention_heads,
        "kv-channels": provider.kv_channels,
        "max-position-embeddings": provider.seq_length,
        "normalization": provider.normalization,
        "position-embedding-type": provider.position_embedding_type,
        "vocab-size": provider.vocab_size - 1,  # NullTokenizer adds one
        "make-vocab-size-divisible-by": 1,
        # Also of a dense model: Megatron checks it, and its default refuses the lengths that pipeline stages exchange.
        "moe-token-dispatcher-type": "alltoall",
    }
    switches = ["--disable-bias-linear"]
    if provider.num_query_groups and provider.num_query_groups != provider.num_attention_heads:
        switches.append("--group-query-attention")
        flags["num-query-groups"] = provider.num_query_groups
    if provider.num_moe_experts:
        flags["num-experts"] = provider.num_moe_experts
        flags["moe-router-topk"] = provider.moe_router_topk
        flags["moe-ffn-hidden-size"] = provider.moe_ffn_hidden_size
    if provider.gated_linear_unit:
        switches.append("--swiglu")
    if not provider.share_embeddings_and_output_weights:
        switches.append("--untie-embeddings-and-output-weights")
    return [f"--{name}={value}" for name, value in flags.items()] + switches


def parse(config: RunConfig, provider: Any) -> Any:
    """Megatron's own parser and validation; returns Megatron's namespace.

    The command line is architecture, device, plugin, then what the user's configuration says, which wins.
    """
    from megatron.training.arguments import parse_and_validate_args, parse_args

    for flag, given in config.megatron.items():
        if given is False and f"--{flag}" in _PLUGIN_FLAGS:
            raise ConfigError(
                f"megatron.{flag}=false has no effect here: this package trains with --{flag}; leave it out"
            )
    device = _CPU_FLAGS if cpu_room.needed() else []
    argv = [*architecture_flags(provider), *device, *_PLUGIN_FLAGS, *config_check.megatron_argv(config)]
    program, sys.argv = sys.argv, [sys.argv[0], *argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check(config, parse_args(), provider)  # first: Megatron's messages lack the numbers
            return parse_and_validate_args()
    except SystemExit as error:
        if error.code != 2:
            raise
        # argparse: the usage of a thousand flags, then the reason
        raise ConfigError(f"Megatron refuses these arguments: {said.getvalue().splitlines()[-1]}") from error
    except ConfigError:
        raise
    except (AssertionError, ValueError) as error:
        reason = str(error) or f"it expects `{traceback.extract_tb(error.__traceback__)[-1].line}`"
        raise ConfigError(f"Megatron refuses these arguments: {reason}") from error
    finally:
        sys.argv = program
        sys.stderr.write(said.getvalue())


def check(config: RunConfig, args: Any, provider: Any) -> None:
    """ConfigError for combinations Megatron accepts but this plugin or its dependencies get wrong."""
    _check_experts(config, args, provider)
    groups = provider.num_query_groups or provider.num_attention_heads
    if provider.num_attention_heads % args.tensor_model_parallel_size or groups % args.tensor_model_parallel_size:
        raise ConfigError(
            f"--tensor-model-parallel-size={args.tensor_model_parallel_size} does not divide the "
            f"{provider.num_attention_heads} attention heads and {groups} key-value heads of {config.model.hf_path}"
        )
    if args.context_parallel_size > 1 and cpu_room.needed():
        raise ConfigError(
            f"--context-parallel-size={args.context_parallel_size}: Megatron's attention without Transformer Engine "
            "has no context parallelism; set it to 1 on a CPU"
        )
    replicas = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    if replicas:
        check_micro_batches(config, replicas)
    _check_optimizer(config, args)
    _check_pipeline_split(args)
    if args.max_seqlen_per_dp_cp_rank:
        _check_packing(args)
    if _virtual_stages_asked_for(args):
        _check_virtual_stages(args, provider, replicas)
    if args.moe_enable_routing_replay:
        _check_replay(config, args, provider)
    if config.longest_sample > args.seq_length:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {config.longest_sample} tokens, more than --seq-length="
            f"{args.seq_length}; raise --seq-length or lower one of them"
        )


def _check_experts(config: RunConfig, args: Any, provider: Any) -> None:
    """ConfigError where Megatron-Bridge's adapters of experts would be wrong, or experts do not divide."""
    etp = args.expert_tensor_parallel_size or 1
    if provider.num_moe_experts and etp != 1:
        raise ConfigError(
            f"--expert-tensor-parallel-size={etp}: Megatron-Bridge's expert LoRA is wrong above 1; set it to 1"
        )
    if provider.num_moe_experts and provider.num_moe_experts % args.expert_model_parallel_size:
        raise ConfigError(
            f"--expert-model-parallel-size={args.expert_model_parallel_size} does not divide the "
            f"{provider.num_moe_experts} experts of {config.model.hf_path}"
        )


def _check_optimizer(config: RunConfig, args: Any) -> None:
    """ConfigError where it would not step, or the engine get what was before a step."""
    if args.optimizer_cpu_offload and (cpu_room.needed() or config.model.dtype == "float32"):
        raise ConfigError(
            "--optimizer-cpu-offload: Megatron's hybrid optimizer steps fp32 copies of bf16 parameters of a GPU, here "
            f"they are {config.model.dtype} on {'a CPU' if cpu_room.needed() else 'a GPU'}; leave it out"
        )
    if args.overlap_param_gather or args.overlap_param_gather_with_optimizer_step:
        raise ConfigError(
            "--overlap-param-gather gathers in the next forward pass what ranks have stepped, and weights are "
            "published before it: the engine would get some from before the step; leave it out, adapters are small"
        )


def _virtual_stages_asked_for(args: Any) -> bool:
    layers, stages = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    return bool(layers or stages)


def _check_pipeline_split(args: Any) -> None:
    """ConfigError for splits of the layers that would not be heeded."""
    names = "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split pipeline_model_parallel_layout"
    for name in filter(lambda name: getattr(args, name), names.split()):
        raise ConfigError(
            f"--{name.replace('_', '-')} does not reach Megatron-Bridge, which builds the model; use "
            "--num-virtual-stages-per-pipeline-rank or --decoder-first-pipeline-num-layers and its like"
        )


def _check_virtual_stages(args: Any, provider: Any, replicas: int) -> None:
    """ConfigError for what Megatron finds out late, or on some ranks only."""
    pipeline, stages = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    if not stages:
        stages = provider.num_layers // (pipeline * args.num_layers_per_virtual_pipeline_stage)
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if not stages or (provider.num_layers % (pipeline * stages) and not uneven):
        raise ConfigError(
            f"--pipeline-model-parallel-size={pipeline} with {stages} virtual stages each does not divide the "
            f"{provider.num_layers} layers; choose other sizes"
        )
    group = args.microbatch_group_size_per_vp_stage or pipeline
    packed = args.max_seqlen_per_dp_cp_rank  # then there may be fewer, but no more than one for each sample
    count = args.global_batch_size // ((1 if packed else args.micro_batch_size or 1) * max(replicas, 1))
    if stages > 1 and (group < pipeline or count % group):
        what = "samples" if packed else "micro-batches"
        raise ConfigError(
            f"{stages} virtual pipeline stages take the {count} {what} that a data-parallel rank has in a train step "
            f"in runs of {group} (--microbatch-group-size-per-virtual-pipeline-stage), which must divide them and be "
            f"at least --pipeline-model-parallel-size={pipeline}; {'' if packed else 'lower --micro-batch-size or '}"
            "raise --global-batch-size"
        )


def _check_packing(args: Any) -> None:
    """ConfigError where micro-batches cannot be made by a budget of tokens."""
    flag = f"--max-seqlen-per-dp-cp-rank={args.max_seqlen_per_dp_cp_rank}"
    if args.hybrid_context_parallel:
        raise ConfigError(f"{flag} packs sequences here, and --hybrid-context-parallel is not there; leave that out")


def _check_replay(config: RunConfig, args: Any, provider: Any) -> None:
    """ConfigError where --moe-enable-routing-replay would have no effect, or a wrong one."""
    flag = "--moe-enable-routing-replay"
    if not provider.num_moe_experts:
        raise ConfigError(f"{flag}: {config.model.hf_path} has no experts; leave it out")
    if args.moe_router_fusion or provider.moe_router_fusion:
        raise ConfigError(f"{flag}: Megatron's fused router (--moe-router-fusion) does not replay; leave that out")
    if Feed.asked_for(config):
        raise ConfigError(f"{flag}: batches that another process feeds come without the engine's experts; leave it out")
