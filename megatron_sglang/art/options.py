"""What a user of ART says about devices and SGLang -> the configuration of a run (`docs/configuration.md`).

SGLangConfig            here
mem_fraction_static     sglang.mem_fraction_static
disable_radix_cache     sglang.disable_radix_cache
max_loras_per_batch     sglang.max_loras_per_batch, where adapters are served
context_length          sglang.context_length
weight_sync_method      sync.method: lora -> adapter where SGLang serves such adapters, else auto; disk; restart
flush_cache_on_sync     nothing to decide, see `_cache`
server_timeout          engine.start_timeout_s; ART_SERVER_TIMEOUT in the environment wins
tensor_parallel_size    engine.tp_size
sglang_python_path      engine.python
log_level               sglang.log_level
health_check_interval   how often the backend asks its endpoint whether it is well
disable_tp_memory_check SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK=false for the engine
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sglang.checkpoint_folder import TRACKER
from megatron_sglang.config import LoraConfig
from megatron_sglang.config_check import in_one_spelling
from megatron_sglang.engine.lora_options import lora_server_args
from megatron_sglang.errors import ConfigError
from megatron_sglang.host import BALANCE

TIMEOUT_VARIABLE = "ART_SERVER_TIMEOUT"
BATCHES = 100_000
"""Calls of `train` that a run is set up for; it ends with `close`, long before."""

CPU_CACHE_TOKENS = 65536
"""Size of the engine's KV cache on a CPU, where a share of the memory would be one of the whole machine's."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Which GPU does what. Without any GPU everything runs on the CPU, one rank for each of `training_devices`."""

    inference_device: int = 0
    """First GPU of the engine, which takes `tensor_parallel_size` of them."""
    training_devices: Sequence[int] = (1,)
    """GPUs of the trainer, one rank on each."""
    auto_detect: bool = True
    """Go by the GPUs that are there: two or more are split between engine and trainer, one is shared in turns."""


@dataclass(frozen=True, slots=True)
class SGLangConfig:
    """The engine, by ART's names and with its defaults."""

    mem_fraction_static: float = 0.9
    """Share of a GPU's memory for weights and KV cache. On a CPU the cache has 65,536 tokens instead, and beside a
    trainer on the same GPUs the default is `EngineOptions.mem_fraction`."""
    disable_radix_cache: bool = False
    """Keep no common prefixes of prompts."""
    max_loras_per_batch: int = 4
    """Adapters in one batch, where adapters are served."""
    context_length: int | None = None
    """Longest prompt with completion, in tokens; None: the model's own."""
    weight_sync_method: Literal["lora", "disk", "restart"] = "lora"
    """How new weights reach the engine."""
    flush_cache_on_sync: bool = False
    """Ask for an empty cache after each. It is so whatever is said here (`docs/art.md`)."""
    server_timeout: float = 120.0
    """Seconds for the engine to come up."""
    tensor_parallel_size: int = 1
    """Ranks of the engine."""
    sglang_python_path: str | None = None
    """Interpreter of the engine's own environment; None: that of .venv-sglang-server where it exists, else this one."""
    health_check_interval: float = 30.0
    """Seconds between two looks at the endpoint; 0: none."""
    log_level: str = "warning"
    """Of SGLang."""
    disable_tp_memory_check: bool = True
    """Start with several ranks even where their GPUs have unequal memory free."""

    def __post_init__(self) -> None:
        methods = ("lora", "disk", "restart")
        if self.weight_sync_method not in methods:
            raise ConfigError(f"weight_sync_method={self.weight_sync_method!r}; expected {' or '.join(methods)}")
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"mem_fraction_static={self.mem_fraction_static}; expected a share between 0 and 1")
        for name in ("max_loras_per_batch", "tensor_parallel_size", "server_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; expected more than 0")

    def start_timeout_s(self, environment: Mapping[str, str]) -> float:
        """Seconds for the engine to come up; `ConfigError` for an ART_SERVER_TIMEOUT that is not a number above 0."""
        given = environment.get(TIMEOUT_VARIABLE)
        if given is None:
            return self.server_timeout
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ConfigError(f"{TIMEOUT_VARIABLE}={given!r}; expected seconds, a number above 0")
        return seconds


@dataclass(frozen=True, slots=True)
class Devices:
    """Who runs where."""

    ranks: int
    """Of the trainer."""
    mode: Literal["colocated", "split", "shared"]
    gpus: tuple[int, ...]
    """Those of the trainer first, then those of the engine that are not among them; none on a CPU."""
    why: str


def place(devices: DeviceConfig, tp_size: int, found: int) -> Devices:
    """`devices` on a machine with `found` GPUs. `ConfigError` for GPUs that are not there."""
    if not found:
        ranks = len(devices.training_devices)
        return Devices(ranks, "colocated", (), f"no GPU: {ranks} trainer rank(s) and the engine on the CPU")
    engine = tuple(range(devices.inference_device, devices.inference_device + tp_size))
    trainer = tuple(devices.training_devices)
    if devices.auto_detect:
        if found == 1:
            return Devices(1, "shared", (0,), "one GPU: engine and trainer take turns on it")
        trainer = tuple(gpu for gpu in range(found) if gpu not in engine)
    missing = sorted({gpu for gpu in (*engine, *trainer) if not 0 <= gpu < found})
    if missing or not trainer:
        raise ConfigError(
            f"the engine wants GPU(s) {_names(engine)}, the trainer {_names(trainer)}; there are {found}: name others "
            "(inference_device, training_devices), or lower tensor_parallel_size"
        )
    if not set(engine) & set(trainer):
        why = f"engine on GPU {_names(engine)}, trainer on {_names(trainer)}"
        return Devices(len(trainer), "split", (*trainer, *engine), why)
    if set(engine) - set(trainer):
        raise ConfigError(
            f"engine on GPU(s) {_names(engine)} and trainer on {_names(trainer)} overlap in part; give them the same "
            "GPUs or different ones"
        )
    mode = "shared" if len(trainer) == 1 else "colocated"
    return Devices(len(trainer), mode, trainer, f"engine and trainer on GPU {_names(trainer)}, {mode}")


def run_config(
    sglang: SGLangConfig,
    devices: Devices,
    *,
    model_path: Path,
    folder: Path,
    options: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, str],
    checkpoints: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Sections of the run's YAML file, `options` on top of what follows from the rest, and what was decided, in words.

    `ConfigError` for options that the backend must set itself.
    """
    for section, name in (("log", "run_dir"), ("rollout", "environment"), ("data", "train"), ("model", "hf_path")):
        if name in options.get(section, {}):
            raise ConfigError(f"options set {section}.{name}, which the backend sets itself; leave it out")
    on_gpu = bool(devices.gpus)
    lora = LoraConfig(**{**options.get("lora", {})})
    method, notes = sync_method(sglang, lora, model_path, on_gpu=on_gpu)
    engine: dict[str, Any] = {"tp_size": sglang.tensor_parallel_size}
    engine["start_timeout_s"] = sglang.start_timeout_s(environment)
    if sglang.sglang_python_path:
        engine["python"] = sglang.sglang_python_path
    served: dict[str, Any] = {"disable_radix_cache": sglang.disable_radix_cache, "log_level": sglang.log_level}
    if not on_gpu:
        served["max_total_tokens"] = CPU_CACHE_TOKENS
    elif devices.mode != "colocated" or sglang.mem_fraction_static != SGLangConfig().mem_fraction_static:
        served["mem_fraction_static"] = (
            sglang.mem_fraction_static
        )  # ART's default would leave a trainer beside it nothing
    if method == "adapter":
        served["max_loras_per_batch"] = sglang.max_loras_per_batch
    if sglang.context_length is not None:
        served["context_length"] = sglang.context_length
    megatron: dict[str, Any] = {"micro-batch-size": 1, "lr": 5e-6, "lr-decay-style": "constant", "clip-grad": 1.0}
    if checkpoints:
        saved = folder / "checkpoints"
        # Of a new step only the newest is kept: nothing but the last is ever continued.
        megatron |= {"save": str(saved), "save-interval": 1, "save-retain-interval": BATCHES * 1000}
        if (saved / TRACKER).exists():
            megatron["load"] = str(saved)
    ours: dict[str, dict[str, Any]] = {
        "model": {"hf_path": str(model_path), "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {"train": "feed"},
        "rollout": {"mode": devices.mode, "batches": BATCHES, "environment": {"name": "feed"}},
        "engine": engine,
        "sync": {"method": method},
        "log": {"run_dir": str(folder / "run"), "trackers": []},
        "sglang": served,
        "megatron": megatron,
    }
    given = {section: in_one_spelling(section, values) for section, values in options.items()}
    merged = {name: {**ours.get(name, {}), **given.get(name, {})} for name in {**ours, **given}}
    merged["megatron"].setdefault("min-lr", merged["megatron"]["lr"])
    return merged, [devices.why, *notes, _cache(sglang, method)]


def sync_method(sglang: SGLangConfig, lora: LoraConfig, model_path: Path, *, on_gpu: bool) -> tuple[str, list[str]]:
    """`sync.method`, and why it is not what was asked for."""
    if sglang.weight_sync_method != "lora":
        return sglang.weight_sync_method, []
    try:
        lora_server_args(lora, str(model_path), "cuda" if on_gpu else "cpu", {})
    except ConfigError as error:
        return "auto", [f"weight_sync_method=lora: merged weights are sent instead of adapters, because {error}"]
    return "adapter", []


def _cache(sglang: SGLangConfig, method: str) -> str:
    asked = f"flush_cache_on_sync={sglang.flush_cache_on_sync}: "
    if method == "adapter":
        return asked + "a new adapter starts with an empty cache, and the old one's is never read again"
    return asked + "every update empties the prefix cache, whose entries would be those of other weights"


def environment_of(sglang: SGLangConfig, devices: Devices, outer: Mapping[str, str]) -> dict[str, str]:
    """Variables of the run: those of this process, the run's GPUs, and what SGLang shall not check."""
    found = dict(outer)
    if devices.gpus:
        visible = [name for name in outer.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        chosen = [visible[gpu].strip() if visible else str(gpu) for gpu in devices.gpus]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    if sglang.disable_tp_memory_check:
        found[BALANCE] = "false"
    return found


def model_folder(base_model: str) -> Path:
    """The Hugging Face folder of a model; a name on the hub is looked up in the cache or downloaded.

    `ConfigError` where neither works.
    """
    folder = Path(base_model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(base_model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except (OSError, HFValidationError) as error:  # of the hub, the network and the cache
        raise ConfigError(
            f"base_model={base_model!r} is no folder with a config.json, and the hub does not give it: {error}; "
            "name a Hugging Face folder"
        ) from error
    return Path(found)


def _names(gpus: Sequence[int]) -> str:
    return ", ".join(map(str, gpus)) or "none"
