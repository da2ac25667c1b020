"""SkyRL's names for what this package calls otherwise: sampling parameters and the generator's configuration.

    sampling({"max_generate_length": 1024, "logprobs": 0, "stop": ["</s>"]})
    SamplingParams(max_new_tokens=1024, stop=("</s>",))

    engine_config({"backend": "sglang", "inference_engine_tensor_parallel_size": 2, "max_num_seqs": 64}, "folder")
    (EngineOptions("folder", tp_size=2, max_running_requests=64), 1)      # options, number of engines

A name that is not known is an error, as is a value that would be ignored: what a recipe says either holds or is refused
with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sglang.engine.options import OWNED, EngineOptions
from megatron_sglang.errors import ConfigError
from megatron_sglang.types import SamplingParams

SAMPLING = {
    "max_generate_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "sampling_seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "logprobs": "top_logprobs",
}
"""SkyRL's, vLLM's or SGLang's name -> that of `SamplingParams`."""

NEUTRAL: dict[str, Any] = {
    "skip_special_tokens": None,
    "include_stop_str_in_output": True,
    "additional_kwargs": None,
    "return_logprob": True,
    "n": 1,
    "ignore_eos": False,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Names that SkyRL or its recipes send -> the only value that they may have here; None: any, it concerns decoding."""

GENERATOR = {
    "inference_engine_tensor_parallel_size": "tp_size",
    "inference_engine_expert_parallel_size": "ep_size",
    "gpu_memory_utilization": "mem_fraction",
    "max_num_seqs": "max_running_requests",
    "model_dtype": "dtype",
    "max_num_batched_tokens": "extra.max_prefill_tokens",
    "enforce_eager": "extra.disable_cuda_graph",
    "enable_lora": "extra.enable_lora",
}
"""SkyRL's generator configuration -> `EngineOptions`."""

BACKENDS = {"nccl": "cuda", "gloo": "cpu", "broadcast": ""}
"""SkyRL's names of how weights travel -> where their tensors are then; empty: anywhere."""

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "inference_engine_pipeline_parallel_size": (
        (1,),
        "SGLang takes weights from tensors without pipeline stages only; raise inference_engine_tensor_parallel_size",
    ),
    "inference_engine_data_parallel_size": (
        (1,),
        "each replica is an engine of its own here; raise num_inference_engines",
    ),
    "backend": (("sglang",), "this is the SGLang backend"),
    "run_engines_locally": ((True,), "engines of another machine are reached by their addresses: EngineClient"),
    "async_engine": ((True,), "requests are asynchronous always"),
    "use_conversation_multi_turn": ((True,), "conversations are append-only token histories"),
    "weight_sync_backend": (
        (*BACKENDS, None),
        "init_weight_update_communicator broadcasts, by NCCL from GPUs and by gloo from CPUs; without it weights are "
        "handed to each engine",
    ),
    "override_existing_update_group": (
        ("auto", "enable", "disable", None),
        "init_weight_update_communicator makes its group anew each time",
    ),
    "enable_http_endpoint": (
        (False, None),
        "it is a process of its own; start megatron-sglang serve --run FOLDER after announce(FOLDER/engine.json)",
    ),
    "chat_template": (
        (None, {}, {"source": "name", "name_or_path": None}),
        "conversations are written by the tokenizer's own template; set tokenizer.chat_template, or render them and "
        "send prompt_token_ids",
    ),
    "chat_template_kwargs": (
        (None, {}),
        "give them to each chat_completion, or render conversations and send prompt_token_ids",
    ),
}
"""What has few values that work, and why."""

_LOOP = "the loop that calls generate() acts on it"
HARMLESS = {
    "weight_transfer_threshold_cuda_ipc_GB": "the whole model is one request, cut into buckets of 512 MiB here",
    "http_endpoint_host": "of the endpoint that enable_http_endpoint may not start",
    "http_endpoint_port": "of the endpoint that enable_http_endpoint may not start",
    "served_model_name": "an answer repeats the name that its request gave",
    "model_name": "an answer repeats the name that its request gave",
    "max_turns": _LOOP,
    "max_input_length": _LOOP,
    "batched": _LOOP,
    "n_samples_per_prompt": _LOOP,
    "eval_n_samples_per_prompt": _LOOP,
    "zero_reward_on_non_stop": _LOOP,
    "apply_overlong_filtering": _LOOP,
}
"""Of SkyRL's generator configuration, what may have any value: why it is nothing to the engine."""

SAMPLED = ("sampling_params", "eval_sampling_params")
"""They come with each input batch; here they are only checked, so that a recipe fails before its engines start."""

ALL_TOKENS = 1 << 30
"""SGLang's top_k of the whole vocabulary."""


def sampling(params: Mapping[str, Any] | None, where: str = "sampling_params") -> SamplingParams:
    """SkyRL's sampling parameters in ours. `logprobs` 0 asks for those of the sampled tokens, which are always given;
    N for those of the N likeliest too. `ConfigError`, which names `where`, for what is unknown or would be ignored."""
    found: dict[str, Any] = {}
    for name, value in (params or {}).items():
        if name in NEUTRAL:
            if NEUTRAL[name] is not None and value is not None and value != NEUTRAL[name]:
                raise ConfigError(
                    f"{where}.{name}={value!r} is not supported; expected {NEUTRAL[name]!r}, or leave it out"
                )
        elif name not in SAMPLING:
            raise _unknown(f"{where}.{name}", name, [*SAMPLING, *NEUTRAL])
        elif value is not None:
            field = SAMPLING[name]
            value = _READ.get(field, lambda it: it)(value)
            if found.setdefault(field, value) != value:
                raise ConfigError(f"{where} gives {field} twice, {found[field]!r} and {name}={value!r}")
    return SamplingParams(**found)


def engine_config(generator: Mapping[str, Any], model_path: str) -> tuple[EngineOptions, int]:
    """Options of one engine, and how many of them, for SkyRL's `generator` configuration.

    `engine_init_kwargs` are SGLang's ServerArgs by name, checked. `ConfigError` for what is unknown or cannot be had.
    """
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    engines = generator.get("num_inference_engines", 1)
    _check(generator)
    for name, value in generator.items():
        if name in GENERATOR and value is not None:
            target = GENERATOR[name].removeprefix("extra.")
            (extra if GENERATOR[name] != target else found)[target] = value
        elif name == "enable_prefix_caching":
            extra["disable_radix_cache"] = not value
    if engines < 1:
        raise ConfigError(f"generator.num_inference_engines={engines} is not a number of engines; set it to 1 or more")
    return _with_kwargs(model_path, found, extra, generator.get("engine_init_kwargs") or {}), engines


def _with_kwargs(
    model_path: str, found: dict[str, Any], extra: dict[str, Any], kwargs: Mapping[str, Any]
) -> EngineOptions:
    """kwargs: ServerArgs; those that are options of ours become these, unless the configuration says another value."""
    options = EngineOptions.__dataclass_fields__.keys() - {"model_path"}
    own = {name: target for name, target in OWNED.items() if target in options}
    for name, value in kwargs.items():
        place, key = (found, own[name]) if name in own else (extra, name)
        if place.setdefault(key, value) != value:
            raise ConfigError(
                f"generator.engine_init_kwargs.{name}={value!r} contradicts the generator's own setting, "
                f"{place[key]!r}; give one of them"
            )
    return EngineOptions(model_path, **found, extra=extra)


def _check(generator: Mapping[str, Any]) -> None:
    others = ("enable_prefix_caching", "num_inference_engines", "engine_init_kwargs")
    known = [*GENERATOR, *FIXED, *HARMLESS, *SAMPLED, *others]
    for name, value in generator.items():
        if name not in known:
            raise _unknown(f"generator.{name}", name, known)
        wanted, why = FIXED.get(name, ((value,), ""))
        if value not in wanted:
            values = " or ".join(repr(one) for one in wanted)
            raise ConfigError(f"generator.{name}={value!r} cannot be had, expected {values}: {why}")
        if name in SAMPLED:
            sampling(value, f"generator.{name}")


def _unknown(subject: str, name: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    return ConfigError(f"{subject} is not known; " + (f"did you mean {close[0]!r}?" if close else f"expected {known}"))


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _top_k(value: int) -> int:
    return -1 if value in (0, ALL_TOKENS) else value


def _top_logprobs(value: int) -> int:
    if isinstance(value, bool) or value < 0:
        raise ConfigError(f"sampling_params.logprobs={value!r}; expected 0, or how many likeliest tokens to show")
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "stop": _texts,
    "stop_token_ids": tuple,
    "top_k": _top_k,
    "top_logprobs": _top_logprobs,
}
