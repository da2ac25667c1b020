"""What SGLang is started with for a sync method: LoRA options that fit the adapters, and what a variable means."""

from __future__ import annotations

import argparse
import json

import pytest

from megatron_sglang.bench import methods
from megatron_sglang.config import LoraConfig
from megatron_sglang.config_check import split_targets
from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.lora_options import lora_server_args
from megatron_sglang.engine.server import clean_environment
from megatron_sglang.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "targets", "text"),
    [
        ({}, ("linear_qkv", "router"), "drop router from lora.targets"),
        ({"num_experts": 8}, ("linear_qkv", "linear_fc1", "linear_fc2"), "drop linear_fc1 and linear_fc2 from"),
        ({"n_routed_experts": 8}, ("linear_fc2",), "drop linear_fc2 from lora.targets"),
    ],
)
def test_targets_that_sglang_cannot_serve_are_refused_with_the_remedy(tmp_path, config, targets, text):
    """It would start, and serve the base in their place."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=text):
        lora_server_args(LoraConfig(targets=targets), str(tmp_path), "cpu", {})


@pytest.mark.parametrize(("targets", "text"), [("linear_qkv,q_proj", "names 'q_proj'"), (",", "is empty")])
def test_a_benchmark_of_adapters_of_nothing_is_refused(targets, text):
    args = argparse.Namespace(methods="direct", lora_targets=targets, lora_rank=4)
    with pytest.raises(ConfigError, match=text):
        methods.run(args, EngineOptions(""), {})


def test_targets_have_blanks_or_commas_between_them():
    assert split_targets(["linear_qkv, linear_proj", "router"]) == ("linear_qkv", "linear_proj", "router")


def test_lora_options_follow_from_the_adapters(tmp_path):
    (tmp_path / "config.json").write_text('{"num_experts": 8}')
    on_gpu = lora_server_args(LoraConfig(rank=4), str(tmp_path), "cuda", {})
    assert on_gpu["lora_backend"] == "triton"
    assert on_gpu["lora_target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    on_cpu = lora_server_args(LoraConfig(rank=4, targets=("linear_proj",)), str(tmp_path), "cpu", {})
    assert (on_cpu["lora_backend"], on_cpu["lora_target_modules"], on_cpu["max_lora_rank"]) == (
        "torch_native",
        ["o_proj"],
        4,
    )
    with pytest.raises(ConfigError, match="has only linear_fc1; name linear_fc1 and linear_fc2 both"):
        lora_server_args(LoraConfig(targets=("linear_fc1",)), str(tmp_path), "cuda", {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "True"}, {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}),
        ({"SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "0"}, {}),
        (
            {"SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "true"},
            {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "true"},
        ),
    ],
)
def test_the_old_balance_variable_means_what_it_says(given, expected):
    """SGLang 0.5.17 hands the value of "disable" to "enable": the advice to set it would switch the check on."""
    assert clean_environment(given) == expected
