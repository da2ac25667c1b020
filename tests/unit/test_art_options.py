"""From ART's names to a run's configuration."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_sglang import config_load
from megatron_sglang.art import DeviceConfig, SGLangBackend, SGLangConfig, TrainableModel
from megatron_sglang.art.endpoint import NAME, Endpoint
from megatron_sglang.art.live import folder_of
from megatron_sglang.art.options import environment_of, model_folder, place, run_config
from megatron_sglang.errors import ConfigError

ROOT = Path(__file__).parents[2]
MOE = ROOT / "examples" / "tiny_fim" / "model"
DENSE = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 8}


def built(
    tmp_path: Path, sglang: SGLangConfig | None = None, gpus: int = 0, model: Path = MOE, **other: Any
) -> tuple[dict[str, Any], list[str]]:
    sglang = sglang or SGLangConfig()
    more = {"options": {}, "environment": {}, "checkpoints": False} | other
    devices = place(DeviceConfig(), sglang.tensor_parallel_size, gpus)
    return run_config(sglang, devices, model_path=model, folder=tmp_path, **more)


def test_defaults_are_those_of_the_document() -> None:
    found = SGLangConfig()
    assert (found.mem_fraction_static, found.disable_radix_cache, found.max_loras_per_batch) == (0.9, False, 4)
    assert (found.context_length, found.weight_sync_method, found.flush_cache_on_sync) == (None, "lora", False)
    assert (found.server_timeout, found.tensor_parallel_size, found.health_check_interval) == (120.0, 1, 30.0)
    assert (found.sglang_python_path, found.log_level, found.disable_tp_memory_check) == (None, "warning", True)
    assert (DeviceConfig().inference_device, list(DeviceConfig().training_devices)) == (0, [1])


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_written_configuration_is_one_that_a_run_reads(tmp_path: Path, gpus: int) -> None:
    """Every field is known and of its type, for a CPU and for two GPUs."""
    options = {"rollout": {"prompts_per_batch": 4}, "megatron": {"lr": 1e-3}}
    config, _ = built(tmp_path, SGLangConfig(sglang_python_path="/p"), gpus, options=options, checkpoints=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    read = config_load.split_argv(["--config", str(path)], local_world_size=1).config
    assert (read.rollout.prompts_per_batch, read.rollout.environment["name"]) == (4, "feed")
    assert (read.megatron["lr"], read.megatron["min-lr"], read.engine.python) == (1e-3, 1e-3, "/p")
    assert read.model.dtype == ("bfloat16" if gpus else "float32")
    assert read.rollout.mode == ("split" if gpus else "colocated")
    assert ("mem_fraction_static" in read.sglang, "max_total_tokens" in read.sglang) == (gpus > 0, gpus == 0)


def test_options_win_however_they_are_spelled(tmp_path: Path) -> None:
    """Underscores for Megatron, dashes for SGLang: both names reach the run, and ours must not be the last."""
    options = {"megatron": {"min_lr": 1e-7, "lr_decay_style": "cosine"}, "sglang": {"log-level": "debug"}}
    config, _ = built(tmp_path, options=options)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    read = config_load.split_argv(["--config", str(path)], local_world_size=1).config
    assert (read.megatron["min-lr"], read.megatron["lr-decay-style"]) == (1e-7, "cosine")
    assert read.sglang["log_level"] == "debug"


def test_the_variable_wins_over_server_timeout(tmp_path: Path) -> None:
    def timeout_s(environment: dict[str, str]) -> float:
        return built(tmp_path, SGLangConfig(server_timeout=90), environment=environment)[0]["engine"]["start_timeout_s"]

    assert timeout_s({}) == 90
    assert timeout_s({"ART_SERVER_TIMEOUT": "180"}) == 180
    for wrong in ("soon", "0", "nan", "inf", ""):
        with pytest.raises(ConfigError, match="ART_SERVER_TIMEOUT"):
            timeout_s({"ART_SERVER_TIMEOUT": wrong})


def test_lora_sends_adapters_where_the_engine_serves_them(tmp_path: Path) -> None:
    """And says why not where it does not: experts on a CPU."""
    config, notes = built(tmp_path)
    assert config["sync"]["method"] == "auto"
    assert any("instead of adapters, because" in note for note in notes)
    assert "max_loras_per_batch" not in config["sglang"]
    attention = {"lora": {"targets": ["linear_qkv", "linear_proj"]}}
    assert built(tmp_path, options=attention)[0]["sync"]["method"] == "adapter"
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    config, notes = built(tmp_path, model=tmp_path)
    assert (config["sync"]["method"], config["sglang"]["max_loras_per_batch"]) == ("adapter", 4)
    for method in ("disk", "restart"):
        assert built(tmp_path, SGLangConfig(weight_sync_method=method))[0]["sync"]["method"] == method  # type: ignore[arg-type]


def test_checkpoints_are_continued_only_where_there_are_some(tmp_path: Path) -> None:
    """--load of an empty folder would be an error."""
    assert "load" not in built(tmp_path, checkpoints=True)[0]["megatron"]
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    (saved / "latest_checkpointed_iteration.txt").write_text("3")
    assert built(tmp_path, checkpoints=True)[0]["megatron"]["load"] == str(saved)
    assert "save" not in built(tmp_path)[0]["megatron"]


@pytest.mark.parametrize(
    "options", [{"log": {"run_dir": "x"}}, {"data": {"train": "x"}}, {"rollout": {"environment": {}}}]
)
def test_what_the_backend_must_decide_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sets itself"):
        built(tmp_path, options=options)


@pytest.mark.parametrize(
    ("devices", "tp_size", "gpus", "mode", "ranks", "order"),
    [
        (DeviceConfig(), 1, 0, "colocated", 1, ()),
        (DeviceConfig(training_devices=[1, 2]), 1, 0, "colocated", 2, ()),
        (DeviceConfig(), 1, 1, "shared", 1, (0,)),
        (DeviceConfig(), 1, 4, "split", 3, (1, 2, 3, 0)),
        (DeviceConfig(), 2, 4, "split", 2, (2, 3, 0, 1)),
        (DeviceConfig(3, [0, 1], auto_detect=False), 1, 4, "split", 2, (0, 1, 3)),
        (DeviceConfig(0, [0], auto_detect=False), 1, 4, "shared", 1, (0,)),
        (DeviceConfig(0, [0, 1], auto_detect=False), 2, 4, "colocated", 2, (0, 1)),
    ],
)
def test_devices(devices: DeviceConfig, tp_size: int, gpus: int, mode: str, ranks: int, order: tuple[int, ...]) -> None:
    found = place(devices, tp_size, gpus)
    assert (found.mode, found.ranks, found.gpus) == (mode, ranks, order)


@pytest.mark.parametrize(
    ("devices", "tp_size", "gpus"),
    [
        (DeviceConfig(0, [7], auto_detect=False), 1, 2),
        (DeviceConfig(0, [1], auto_detect=False), 1, 1),
        (DeviceConfig(), 2, 2),
        (DeviceConfig(1, [0, 1], auto_detect=False), 2, 4),
    ],
)
def test_devices_that_cannot_be(devices: DeviceConfig, tp_size: int, gpus: int) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        place(devices, tp_size, gpus)


def test_gpus_are_counted_among_those_that_the_backend_may_use() -> None:
    """With CUDA_VISIBLE_DEVICES=4,5 device 1 is GPU 5."""
    devices = place(DeviceConfig(0, [1], auto_detect=False), 1, 2)
    assert environment_of(SGLangConfig(), devices, {"CUDA_VISIBLE_DEVICES": "4,5"})["CUDA_VISIBLE_DEVICES"] == "5,4"
    found = environment_of(SGLangConfig(), devices, {})
    assert (found["CUDA_VISIBLE_DEVICES"], found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"]) == ("1,0", "false")
    assert environment_of(SGLangConfig(disable_tp_memory_check=False), place(DeviceConfig(), 1, 0), {}) == {}


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    assert folder_of(tmp_path, "p", "m-1.5") == tmp_path / "p" / "m-1.5"
    for name in ("", "..", "a/b", "/etc", ".hidden"):
        with pytest.raises(ConfigError, match="no name for a folder"):
            folder_of(tmp_path, "p", name)


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be had is said to be so, without a traceback of the hub's."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--me--tiny"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    assert (model_folder("me/tiny") / "config.json").is_file()
    for unknown in ("me/other", "no folder"):
        with pytest.raises(ConfigError, match="base_model="):
            model_folder(unknown)


def test_two_forms_of_devices_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of the two forms"):
        SGLangBackend(inference_device=0, device_config=DeviceConfig())
    backend = SGLangBackend(inference_device=2, training_devices=[3])
    assert backend.device_config == DeviceConfig(2, [3], auto_detect=False)


@pytest.mark.parametrize("wrong", [{"weight_sync_method": "x"}, {"mem_fraction_static": 1.5}, {"server_timeout": 0}])
def test_values_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SGLangConfig(**wrong)


def test_of_two_models_registered_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were started, and the processes of the first were nobody's: `close` ended the second's only."""
    running: list[str] = []

    class Live:
        endpoint = SimpleNamespace(base_url="", api_key="", model_name="")

        def __init__(self, folder: Path, *_: Any, **__: Any) -> None:
            self.name = folder.name

        async def start(self, _: Any) -> None:
            await asyncio.sleep(0.05)
            running.append(self.name)

        async def close(self) -> None:
            running.remove(self.name)

    monkeypatch.setattr("megatron_sglang.art.backend.Live", Live)

    async def register_two() -> list[Any]:
        async with SGLangBackend() as backend:
            models = [TrainableModel(name, "project", str(MOE), base_path=str(tmp_path)) for name in "ab"]
            return await asyncio.gather(*map(backend.register, models), return_exceptions=True)

    first, second = asyncio.run(register_two())
    assert first is None
    assert isinstance(second, ConfigError)
    assert "this backend trains 'a'" in str(second)
    assert running == []

    async def close_meanwhile() -> None:
        backend = SGLangBackend()
        model = TrainableModel("a", "project", str(MOE), base_path=str(tmp_path))
        registering = asyncio.create_task(backend.register(model))
        await asyncio.sleep(0)
        await backend.close()
        await registering

    asyncio.run(close_meanwhile())
    assert running == []


def test_a_watch_that_failed_does_not_keep_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error came out of `close`, before anything was ended."""
    closed: list[bool] = []

    async def problem() -> str:
        raise OSError(24, "Too many open files")

    async def started(*_: Any) -> None:
        pass

    async def close(_: Any) -> None:
        closed.append(True)

    endpoint = SimpleNamespace(base_url="", api_key="", model_name="", problem=problem)
    live = type("Live", (), {"__init__": lambda *_, **__: None, "endpoint": endpoint, "start": started, "close": close})
    monkeypatch.setattr("megatron_sglang.art.backend.Live", live)

    async def train_for_a_while() -> None:
        async with SGLangBackend(sglang_config=SGLangConfig(health_check_interval=0.01)) as backend:
            await backend.register(TrainableModel("a", "project", str(MOE), base_path=str(tmp_path)))
            await asyncio.sleep(0.1)

    asyncio.run(train_for_a_while())
    assert closed == [True]


def test_an_endpoint_that_cannot_be_asked_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx reads certificates even for loopback; where no descriptor is free, that ended the watch without a word."""

    def no_descriptor(**_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("httpx.AsyncClient", no_descriptor)
    child = SimpleNamespace(ended=asyncio.Event())
    endpoint = Endpoint(SimpleNamespace(children={NAME: child}), tmp_path, tmp_path / "log", "m", 0)  # pyright: ignore
    assert "Too many open files" in asyncio.run(endpoint.problem())
