"""SkyRL's names: each does what the recipe means, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.engine.skyrl_names import engine_config, sampling
from megatron_sglang.errors import ConfigError
from megatron_sglang.types import SamplingParams

RECIPE = {
    "backend": "sglang",
    "run_engines_locally": True,
    "num_inference_engines": 4,
    "inference_engine_tensor_parallel_size": 4,
    "inference_engine_pipeline_parallel_size": 1,
    "inference_engine_data_parallel_size": 1,
    "inference_engine_expert_parallel_size": 2,
    "gpu_memory_utilization": 0.8,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 1024,
    "enable_prefix_caching": True,
    "enable_lora": True,
    "weight_sync_backend": "nccl",
    "async_engine": True,
    "batched": True,
    "override_existing_update_group": "auto",
    "enable_http_endpoint": False,
    "http_endpoint_port": 8000,
    "chat_template": {"source": "name", "name_or_path": None},
    "chat_template_kwargs": {},
    "max_turns": 3,
    "sampling_params": {"max_generate_length": 1024, "temperature": 1.0, "stop": None, "logprobs": 0},
    "eval_sampling_params": {"max_generate_length": 1024, "temperature": 0.0},
    "engine_init_kwargs": {"attention_backend": "fa3", "max_lora_rank": 64, "context_length": 4096},
}


def test_sampling_parameters_of_a_recipe() -> None:
    """A name that is dropped on the way samples from another distribution than the recipe says."""
    params = {
        "max_generate_length": 1024,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.05,
        "logprobs": 0,
        "stop": ["</s>", "\n\n"],
        "min_new_tokens": 8,
        "skip_special_tokens": True,
    }
    assert sampling(params) == SamplingParams(
        temperature=0.7, top_p=0.9, min_p=0.05, max_new_tokens=1024, min_new_tokens=8, stop=("</s>", "\n\n")
    )
    assert sampling({"max_tokens": 5, "logprobs": 3, "stop": "x", "seed": 4}) == SamplingParams(
        max_new_tokens=5, top_logprobs=3, stop=("x",), seed=4
    )
    assert sampling(None) == SamplingParams()
    assert sampling({"top_k": 1 << 30, "logprobs": None}).top_k == -1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_generate_lenght": 3}, "did you mean 'max_generate_length'"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported; expected 1.0"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "gives max_new_tokens twice"),
    ],
)
def test_sampling_parameters_that_would_be_lost(params: dict[str, Any], message: str) -> None:
    """Sampling goes wrong in silence."""
    with pytest.raises(ConfigError, match=message):
        sampling(params)


def test_engine_of_a_recipe() -> None:
    """The whole generator section of the documented example, in our options."""
    options, engines = engine_config(RECIPE, "folder")
    assert engines == 4
    assert options == EngineOptions(
        "folder",
        tp_size=4,
        ep_size=2,
        mem_fraction=0.8,
        max_running_requests=1024,
        context_length=4096,
        extra={
            "max_prefill_tokens": 8192,
            "disable_radix_cache": False,
            "enable_lora": True,
            "attention_backend": "fa3",
            "max_lora_rank": 64,
        },
    )


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"inference_engine_pipeline_parallel_size": 2}, "without pipeline stages only; raise .*tensor_parallel_size"),
        ({"inference_engine_data_parallel_size": 2}, "engine of its own here; raise num_inference_engines"),
        ({"backend": "vllm"}, "backend='vllm' cannot be had"),
        ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'"),
        ({"num_inference_engines": 0}, "not a number of engines"),
        ({"weight_sync_backend": "ncll"}, "'ncll' cannot be had, expected 'nccl' or 'gloo' or 'broadcast'"),
        ({"override_existing_update_group": "force_new"}, "'force_new' cannot be had, expected 'auto' or"),
        ({"enable_http_endpoint": True}, "start megatron-sglang serve --run"),
        ({"chat_template": {"source": "name", "name_or_path": "qwen3"}}, "set tokenizer.chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "give them to each chat_completion"),
        ({"sampling_params": {"max_new_token": 3}}, r"generator\.sampling_params\.max_new_token .*did you mean"),
        (
            {"eval_sampling_params": {"repetition_penalty": 1.2}},
            r"generator\.eval_sampling_params\.repetition_penalty=",
        ),
        ({"engine_init_kwargs": {"attention_backned": "fa3"}}, "did you mean 'attention_backend'"),
        ({"engine_init_kwargs": {"skip_tokenizer_init": False}}, "which this package owns"),
        ({"max_num_seqs": 8, "engine_init_kwargs": {"max_running_requests": 9}}, "=9 contradicts .* own setting, 8"),
        ({"inference_engine_tensor_parallel_size": 4, "inference_engine_expert_parallel_size": 3}, "does not divide"),
    ],
)
def test_engines_that_cannot_be_had(generator: dict[str, Any], message: str) -> None:
    """Found out an hour later, by the memory that runs out or the pipeline that never starts; or not at all."""
    with pytest.raises(ConfigError, match=message):
        engine_config(generator, "folder")
