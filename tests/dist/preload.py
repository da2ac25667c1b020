"""What a run imports on its way, imported once before ranks are forked: a quarter of the CPU time of a small run."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib import import_module

from megatron.training.arguments import add_megatron_arguments

for _name in """
    megatron.core.models.mimo
    megatron.core.tokenizers.text.libraries
    megatron.core.tokenizers.text.models
    tiktoken
    transformers.models.qwen3_moe.modeling_qwen3_moe
    megatron_sglang.agents.single
    megatron_sglang.config_load
    megatron_sglang.engine.client
    megatron_sglang.engine.group
    megatron_sglang.report
    megatron_sglang.rewards.function
    megatron_sglang.rewards.lean
    megatron_sglang.rewards.python_fim
    megatron_sglang.rewards.registry
    megatron_sglang.training.offload
    megatron_sglang.training.paths
    megatron_sglang.training.run
    megatron_sglang.training.shared
""".split():
    import_module(_name)

add_megatron_arguments(ArgumentParser())  # reads the sources of Megatron's configurations for its help, and keeps them
