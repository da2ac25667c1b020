"""Build the model that Megatron trains: a Bridge provider from a Hugging Face folder, its weights, LoRA on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_sglang.config import RunConfig
from megatron_sglang.cpu import trainer as cpu_room
from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.training import arguments, checkpoint, lora

_EXECUTION_FIELDS = [
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "distribute_saved_activations",
    "moe_token_dispatcher_type",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "moe_layer_recompute",
    "moe_enable_routing_replay",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "attention_dropout",
    "hidden_dropout",
    "attention_backend",
    "deterministic_mode",
    "calculate_per_token_loss",
    "use_cpu_initialization",
    "tp_comm_overlap",
    "cpu_offloading",
    "overlap_p2p_comm",
    "overlap_p2p_comm_warmup_flush",
    "microbatch_group_size_per_vp_stage",
]
"""Fields of the provider that say how the model runs: Megatron's flags decide. What the model is, config.json decides,
through Bridge."""
_EXECUTION_FIELDS_IF_GIVEN = [
    "attention_softmax_in_fp32",
    "barrier_with_L1_time",
    "clone_scatter_output_in_embedding",
    "cp_comm_type",
    "cpu_offloading_num_layers",
    "disable_bf16_reduced_precision_matmul",
    "moe_deepep_num_sms",
    "moe_enable_deepep",
    "moe_flex_dispatcher_backend",
    "moe_router_dtype",
    "tp_comm_bulk_dgrad",
    "tp_comm_bulk_wgrad",
    "tp_comm_overlap_ag",
    "tp_comm_overlap_rs",
    "tp_comm_split_ag",
    "tp_comm_split_rs",
]
"""Such fields, too, but only where the flag was given: its default must not replace what Bridge chose for the model."""
_UNUSED_BY_PROVIDER = {
    "seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "transformer_impl",
    "max_seqlen_per_dp_cp_rank",
}
"""Fields that a provider has but does not use here, so that it does not matter if the flag says something else."""


class ModelRecipe:
    """How this run builds Megatron's model. Parses Megatron's arguments, so make one before `pretrain`.

    args: Megatron's namespace. bridge: Megatron-Bridge of the Hugging Face folder, also used for export.
    """

    def __init__(self, config: RunConfig) -> None:
        arguments.check_versions()
        self.config = config
        self.bridge = arguments.load_bridge(config.model.hf_path)
        self.provider = self.bridge.to_megatron_provider(load_weights=False)
        self.left_out: int = getattr(self.provider, "mtp_num_layers", None) or 0
        """Layers for multi-token prediction that config.json has and the trainer's model has not: nothing in RL trains
        them, an engine that does not decode speculatively has none, and adapters on them would never get a gradient."""
        if self.left_out:
            self.provider.mtp_num_layers = None
        self.args = arguments.parse(config, self.provider)
        self._chunks: list[torch.nn.Module] = []
        """Model chunks of this rank that were built and wait for the last one to be loaded with it."""
        self._configure()

    def model_provider(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """Build one model chunk of this rank; `pretrain` calls it. The chunk gets base weights and fresh adapters, and
        will be saved without the base.

        Where a rank has several chunks (virtual pipeline stages), they are returned as they are built, and all of them
        get weights and adapters when the last one is."""
        self.provider._pg_collection = pg_collection
        chunks = self.provider.virtual_pipeline_model_parallel_size or 1
        if self.config.model.random_weights:
            # On a CPU Megatron draws from torch's default generator, which ranks have used differently since it was
            # seeded; copies of a weight must be the same on all of them.
            from megatron.core import parallel_state as mpu

            stage = mpu.get_pipeline_model_parallel_rank()
            stage += mpu.get_pipeline_model_parallel_world_size() * (vp_stage or 0)
            torch.manual_seed(self.config.seed + 100 * stage)  # apart by as much as Megatron's own seeds of stages are
        model = self.provider.provide(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        self._chunks.append(model)
        if len(self._chunks) == chunks:
            self._load_and_adapt(self._chunks)
            self._chunks = []
        return model

    def _load_and_adapt(self, chunks: list[torch.nn.Module]) -> None:
        """Base weights, then adapters, for all chunks at once: Bridge learns the names of the whole model from the
        first call, and the last stage's output layer, which may be tied to the embedding, is in its last chunk only."""
        if not self.config.model.random_weights:
            self._load(chunks)
        for chunk in chunks:
            adapted = lora.apply(chunk, self.config.lora, self.config.seed)
            assert adapted is chunk, "Megatron has this object already"
            checkpoint.only_adapters(chunk)

    def _load(self, chunks: list[torch.nn.Module]) -> None:
        try:
            self.bridge.load_hf_weights(chunks)
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise DataError(
                f"the weights in {self.config.model.hf_path} do not fit its config.json: "
                f"{type(error).__name__}: {error}"
            ) from error
        except AttributeError as error:  # Bridge asks a mapping that it lacks for its module
            raise DataError(
                f"Megatron-Bridge does not know some parameters of {self.config.model.hf_path} as they are built here "
                f"({error}); choose another model, or a GPU for GLM4-MoE, whose experts it knows only grouped"
            ) from error

    def _configure(self) -> None:
        """Copy what Megatron's flags say about execution into the provider, and finalize it."""
        args = self.args
        asked = arguments.fields_of(self.config.megatron)
        names = [*_EXECUTION_FIELDS, *(name for name in _EXECUTION_FIELDS_IF_GIVEN if name in asked)]
        overrides = {name: getattr(args, name) for name in names if hasattr(args, name)}
        if isinstance(kinds := overrides.get("cp_comm_type"), list) and len(kinds) == 1:
            overrides["cp_comm_type"] = kinds[0]
        copied = overrides.keys() | _UNUSED_BY_PROVIDER
        overrides |= {
            "pipeline_dtype": args.params_dtype,
            "autocast_dtype": args.params_dtype,
            "moe_aux_loss_coeff": 0.0,
            "moe_router_bias_update_rate": 0.0,  # the base is frozen, and so is its routers' expert_bias
            "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
            "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
            # Batches are padded to their longest sequence, so pipeline stages tell each other the length.
            "variable_seq_lengths": args.pipeline_model_parallel_size > 1,
            # As Megatron sets it: one batch of sends and receives, or each by itself. Virtual stages of two ranks send
            # each other activations and gradients, which one batch would confuse.
            "batch_p2p_comm": not args.overlap_p2p_comm,
        }
        if cpu_room.needed():
            overrides |= {"transformer_layer_spec": cpu_room.layer_spec(self.provider)}
            overrides |= {"moe_grouped_gemm": False, "moe_permute_fusion": False}  # Transformer Engine's kernels
        known = {name: value for name, value in overrides.items() if hasattr(self.provider, name)}
        try:
            self.provider.apply_overrides_and_finalize(dtype=args.params_dtype, overrides=known)
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"Megatron refuses these arguments for {self.config.model.hf_path}: {error}") from error
        self._refuse_without_effect({name: flag for name, flag in asked.items() if name not in copied})

    def _refuse_without_effect(self, flags: Mapping[str, str]) -> None:
        """ConfigError for a given flag that contradicts the model: it would silently have no effect. flags: field of
        the provider -> Megatron's flag for it."""
        for name, flag in sorted(flags.items()):
            wanted, found = getattr(self.args, name, None), getattr(self.provider, name, None)
            if isinstance(wanted, list) and len(wanted) == 1:  # it may be given several times
                wanted = wanted[0]
            if hasattr(self.args, name) and hasattr(self.provider, name) and wanted != found:
                raise ConfigError(
                    f"--{flag}={wanted} has no effect here: Megatron-Bridge builds the model from "
                    f"{self.config.model.hf_path}, with {name}={found}; leave it out, or change config.json"
                )
