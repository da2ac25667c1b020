"""What a rollout engine is made of, and its translation into SGLang's ServerArgs."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_sglang.errors import ConfigError

LOADER = "megatron_sglang.engine.loader.load"
"""Where SGLang finds our weight loader; also the `load_format` of every update we send."""

PREFILL_TOKENS = 16384
"""SGLang's max_prefill_tokens: of one batch of prompts."""

ENVIRONMENT = Path(".venv-sglang-server", "bin", "python")
"""Interpreter of the engine's own environment, where the working folder has one."""

MAILBOX_VARIABLE = "MEGATRON_SGLANG_MAILBOX"
"""Environment variable that tells the loader where to put its answers."""

OWNED = {
    "model_path": "model_path",
    "tp_size": "tp_size",
    "ep_size": "ep_size",
    "dtype": "dtype",
    "load_format": "load_format",
    "device": "device",
    "mem_fraction_static": "mem_fraction",
    "max_total_tokens": "max_total_tokens",
    "max_running_requests": "max_running_requests",
    "context_length": "context_length",
    "random_seed": "seed",
    "enable_deterministic_inference": "deterministic",
    "host": "nothing: the engine always listens on 127.0.0.1",
    "port": "nothing: the engine takes a port the system has reserved for it",
    "dist_init_addr": "nothing: the ranks meet on the loopback interface",
    "nccl_port": "nothing: the ranks meet on the loopback interface",
    "api_key": "nothing: a random key is made for each engine",
    "admin_api_key": "nothing: a random key is made for each engine",
    "custom_weight_loader": "nothing: weights come through our own loader",
    "enable_return_routed_experts": "routed_experts",
    "skip_tokenizer_init": "nothing: the engine speaks token ids",
    "skip_server_warmup": "nothing: there are no weights to warm up with before the first sync",
    "trust_remote_code": "nothing: code from a checkpoint is never run",
    "pp_size": "tp_size: SGLang takes weights from tensors without pipeline stages only",
    "dp_size": "tp_size: where it is smaller than the trainer's ranks there are several engines, each one replica",
    "nnodes": "nothing: an engine lives on one node",
    "tokenizer_worker_num": "nothing: API keys work with one tokenizer process only",
}
"""ServerArgs fields that `extra` must not set, each with what to use instead."""
ENGINE_FIELDS = {
    "mem_fraction_static": "mem_fraction",
    "max_total_tokens": "max_total_tokens",
    "max_running_requests": "max_running_requests",
    "context_length": "context_length",
}
"""SGLang's option -> the field of `EngineOptions` that stands for it, where users name it as SGLang does."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything needed to start one engine. Seconds for all `*_timeout_s`."""

    model_path: str
    """HF folder: config.json and, with `load_format="auto"`, weights."""
    kind: Literal["sglang", "fake"] = "sglang"
    tp_size: int = 1
    ep_size: int = 1
    """Expert parallel size within the tp_size ranks; 1 shards every expert instead."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    load_format: Literal["dummy", "auto"] = "dummy"
    """dummy: random weights, so it is stale until the first update; auto: serve the folder's weights as version 0."""
    mem_fraction: float = 0.3
    """Share of the device's memory for weights and KV cache."""
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens; None lets mem_fraction decide."""
    max_running_requests: int | None = None
    context_length: int | None = None
    start_timeout_s: float = 600.0
    request_timeout_s: float = 1800.0
    """For one `generate` call, however many requests it holds."""
    update_timeout_s: float = 300.0
    """For each message of a weight update, flush and release."""
    log_path: str | None = None
    """Where the server's output is appended; None puts it into a temporary folder that close() removes."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    """Equal requests with equal seeds give equal tokens whatever else runs (docs/engine.md: what is guaranteed)."""
    routed_experts: bool = False
    """Whether requests may ask which experts processed their tokens."""
    python: str = sys.executable
    """Interpreter of the server."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More of SGLang's ServerArgs by field name; for kind "fake" its script (`engine/fake.py`)."""

    def __post_init__(self) -> None:
        for name in ("tp_size", "ep_size"):
            if (ranks := getattr(self, name)) < 1:
                raise ConfigError(f"engine.{name}={ranks} is not a number of ranks; set it to 1 or more")
        if self.tp_size % self.ep_size:
            raise ConfigError(
                f"engine.ep_size={self.ep_size} does not divide engine.tp_size={self.tp_size}; "
                "experts are spread over the tensor-parallel ranks, so set it to a divisor"
            )
        if self.kind == "sglang":
            check_extra(self.extra)

    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """`device`, with "auto" answered by torch; a fake engine has none but the CPU."""
        if self.kind == "fake":
            return "cpu"
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


MOVES_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "quantization": (),
    "quantize_and_serve": (),
    "torchao_config": (),
    "moe_runner_backend": ("auto", "triton"),
    "enable_eplb": (),
    "ep_num_redundant_experts": (),
    "cpu_offload_gb": (),
    "offload_group_size": (-1,),
}
"""SGLang's options that change or move weights after loading, each with its harmless values. None, False and 0 always
are harmless."""


def find_python(given: str = "") -> str:
    """Interpreter for the engine: the given one, that of `ENVIRONMENT` in the working folder, or ours."""
    if given:
        return str(Path(given).expanduser())
    # Not resolved: a virtual environment's interpreter is a link, and finds its packages by where the link is.
    own = Path.cwd() / ENVIRONMENT
    return str(own) if own.exists() else sys.executable


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuse names that ServerArgs does not have (where SGLang is installed) or that this package owns."""
    known = server_args_fields()
    for name in extra:
        if name in OWNED:
            raise ConfigError(f"engine.extra sets {name!r}, which this package owns; use {OWNED[name]}")
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `python -m sglang.launch_server --help`"
            raise ConfigError(f"engine.extra sets {name!r}, which SGLang's ServerArgs does not have; {hint}")
    if reason := why_moved(extra):
        raise ConfigError(f"{reason}; leave it out")


def why_moved(options: Mapping[str, Any]) -> str:
    """Which of SGLang's options (`MOVES_WEIGHTS`) makes updates of its weights wrong; empty: none does."""
    for name, harmless in MOVES_WEIGHTS.items():
        if (value := options.get(name)) and value not in harmless:
            return (
                f"{name}={value!r}: SGLang changes or moves weights after it has loaded them, which an update would "
                "not repeat, and what is served would not be what was proved"
            )
    return ""


@functools.cache
def server_args_fields() -> frozenset[str]:
    """Names of SGLang's ServerArgs, read from its source (its import takes ten seconds); empty without SGLang."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0], "srt", "server_args.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs":
            return frozenset(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    return frozenset()


def has_fa3(site: Path | None = None) -> bool:
    """Are SGLang's FlashAttention 3 kernels installed? They are a gigabyte, and left out where environments are carried
    by hand (scripts/pack_for_gpu_host.py). site: where to look; None: where sgl_kernel is."""
    if site is None:
        spec = importlib.util.find_spec("sgl_kernel")
        if spec is None or not spec.submodule_search_locations:
            return False
        return any(any(Path(place).glob("flash_ops*.so")) for place in spec.submodule_search_locations)
    return any(site.glob("sgl_kernel/flash_ops*.so"))


def cuda_defaults(deterministic: bool, *, fa3: bool) -> dict[str, Any]:
    """What differs from SGLang's own defaults on a GPU, so that an engine starts and takes updates; `sglang.*` wins."""
    chosen: dict[str, Any] = {
        # Without it `release` frees nothing, and says it did.
        "enable_memory_saver": True,
        "enable_deterministic_inference": deterministic,
        # Other runners permute w13/w2 after loading, which an update would not repeat.
        "moe_runner_backend": "triton",
        # Compiles for minutes at start on Hopper with TP > 1.
        "enforce_disable_flashinfer_allreduce_fusion": True,
        # Decoding waits for kernel launches without them.
        "disable_cuda_graph": False,
    }
    if not fa3:
        # SGLang takes FlashAttention 3 on Hopper without looking whether it is there, and dies at the first prompt.
        chosen["attention_backend"] = "triton"
    return chosen


def server_args(options: EngineOptions, port: int) -> dict[str, Any]:
    """ServerArgs for `options`; `extra` wins over our defaults, never over what we own."""
    deterministic = options.deterministic
    device = options.resolved_device()
    ours: dict[str, Any] = {
        "model_path": options.model_path,
        "host": "127.0.0.1",
        "port": port,
        "device": device,
        "tp_size": options.tp_size,
        "ep_size": options.ep_size,
        "dtype": options.dtype,
        "load_format": options.load_format,
        "mem_fraction_static": options.mem_fraction,
        "max_total_tokens": options.max_total_tokens,
        "max_running_requests": options.max_running_requests,
        "context_length": options.context_length,
        "random_seed": options.seed,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "custom_weight_loader": [LOADER],
        "enable_return_routed_experts": options.routed_experts,
    }
    if device == "cpu":
        ours["enable_memory_saver"] = False  # it is CUDA's; `release` frees no bytes here
    defaults: dict[str, Any] = {
        "log_level": "warning",
        "grammar_backend": "none",
        "sampling_backend": "pytorch",
        # Otherwise each event of a stream repeats all before it.
        "incremental_streaming_output": True,
    }
    if device == "cpu":
        defaults |= {
            "attention_backend": "torch_native",
            "disable_overlap_schedule": True,
            "disable_cuda_graph": True,
            "disable_custom_all_reduce": True,
            "chunked_prefill_size": -1,
            # A cached prefix changes the shapes that a prompt is computed in, and so its last bits.
            "disable_radix_cache": deterministic,
            # Idle schedulers would otherwise spin on the cores the trainer needs.
            "sleep_on_idle": True,
        }
        if options.routed_experts:
            # SGLang sizes its buffer of experts by it; so large, it cuts no prompt that fits into one batch.
            defaults["chunked_prefill_size"] = PREFILL_TOKENS
    else:
        defaults |= cuda_defaults(deterministic, fa3=options.python != sys.executable or has_fa3())
    if options.routed_experts:
        _check_routing(defaults | dict(options.extra))
    extra = dict(options.extra)
    if extra.get("moe_runner_backend") == "auto":
        del extra["moe_runner_backend"]  # as if it had not been given: SGLang would choose one that moves weights
    return defaults | extra | ours


def _check_routing(given: Mapping[str, Any]) -> None:
    """Where SGLang 0.5.17 would lose experts, or fail: it keeps them by place in the KV cache (state_capturer/)."""
    if (given.get("chunked_prefill_size") or 1) < 1:
        raise ConfigError(
            f"chunked_prefill_size={given['chunked_prefill_size']} with routed experts: SGLang sizes its buffer of "
            f"them by it; set it to {PREFILL_TOKENS}, or leave it out"
        )
    for name in ("enable_hierarchical_cache", "speculative_algorithm"):
        if given.get(name):
            raise ConfigError(
                f"{name}={given[name]} with routed experts: they are kept beside the KV cache of the device, for "
                "tokens that were really processed there; leave one of the two out"
            )
