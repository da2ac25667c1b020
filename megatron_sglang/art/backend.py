"""`SGLangBackend`: register a model, sample from its endpoint, train it on trajectories.

backend = SGLangBackend(inference_device=0, training_devices=[1])
async with backend:
    await backend.register(model)
    client = model.openai_client()
    ...                                     # trajectories with the choices that the endpoint gave, and rewards
    result = await backend.train(model, groups, config=TrainConfig(learning_rate=1e-5))
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from megatron_sglang.art import convert, options
from megatron_sglang.art.live import Live, folder_of
from megatron_sglang.art.options import DeviceConfig, SGLangConfig
from megatron_sglang.art.records import TrainResult
from megatron_sglang.errors import ConfigError, MegatronSglangError, SetupError

log = logging.getLogger(__name__)


class SGLangBackend:
    """Trains one model at a time, in processes of its own that end with it. Of one event loop.

    inference_device, training_devices: GPUs; with neither, what `device_config` says, by default those that are there.
    options: sections and fields of the run's configuration (docs/configuration.md), which win over what follows from
    the rest: {"rollout": {"prompts_per_batch": 4, "samples_per_prompt": 8}, "lora": {"rank": 8}, "megatron": {...}}.
    checkpoints: keep the newest in the model's folder and go on from it. train_timeout: seconds for the start and for
    each train step. port: of the endpoint, on 127.0.0.1; 0 takes a free one.
    """

    def __init__(
        self,
        inference_device: int | None = None,
        training_devices: Sequence[int] | None = None,
        sglang_config: SGLangConfig | None = None,
        *,
        device_config: DeviceConfig | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        checkpoints: bool = True,
        train_timeout: float = 3600.0,
        port: int = 0,
    ) -> None:
        given = {"inference_device": inference_device, "training_devices": training_devices}
        given = {name: value for name, value in given.items() if value is not None}
        if given and device_config is not None:
            raise ConfigError(f"{' and '.join(given)} and device_config are given; give one of the two forms")
        self.device_config = device_config or (DeviceConfig(**given, auto_detect=False) if given else DeviceConfig())
        self.sglang_config = sglang_config or SGLangConfig()
        self.options = {name: dict(section) for name, section in (options or {}).items()}
        self.checkpoints, self.train_timeout, self.port = checkpoints, train_timeout, port
        self.notes: list[str] = []
        """What was decided at `register`, and why; also logged."""
        self._live: Live | None = None
        self._model: Any = None
        self._changing = asyncio.Lock()
        """Held by `register` and `close`: of two models that are registered at once one must be refused, or nobody
        would end its processes."""
        self._training = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def register(self, model: Any) -> None:
        """Start the training run and the endpoint of `model`; returns when version 1 of its weights is served.

        model: a `TrainableModel`, or ART's. Its `inference_` fields are filled. Raises `ConfigError` for what cannot
        work, else the run's own error, with its log.
        """
        async with self._changing:
            await self._register(model)

    async def _register(self, model: Any) -> None:
        if self._live is not None:
            raise ConfigError(
                f"this backend trains {self._model.name!r}; close it before {model.name!r}, or use a second one "
                "on other devices"
            )
        base_model = getattr(model, "base_model", None)
        if not isinstance(base_model, str):
            raise ConfigError(f"model {model.name!r} has no base_model; expected a TrainableModel")
        folder = folder_of(getattr(model, "base_path", None) or "./.art", model.project, model.name)
        path = await asyncio.to_thread(options.model_folder, base_model)
        devices = options.place(
            self.device_config, self.sglang_config.tensor_parallel_size, await asyncio.to_thread(_count_gpus)
        )
        config, self.notes = options.run_config(
            self.sglang_config,
            devices,
            model_path=path,
            folder=folder,
            options=self.options,
            environment=os.environ,
            checkpoints=self.checkpoints,
        )
        for note in self.notes:
            log.info("%s: %s", model.name, note)
        environment = options.environment_of(self.sglang_config, devices, os.environ)
        live = Live(folder, devices, environment, timeout_s=self.train_timeout, port=self.port)
        await live.start(config)
        assert live.endpoint is not None
        self._live, self._model = live, model
        model.inference_base_url = live.endpoint.base_url
        model.inference_api_key = live.endpoint.api_key
        model.inference_model_name = live.endpoint.model_name
        if self.sglang_config.health_check_interval > 0:
            self._watching = asyncio.create_task(self._watch(live))

    async def train(
        self,
        model: Any,
        trajectory_groups: Iterable[Any],
        config: Any = None,
        *,
        learning_rate: float | None = None,
    ) -> TrainResult:
        """One GSPO step (as many as the groups make, see docs/art.md); returns when the new weights are served.

        config: a `TrainConfig`, or ART's; `learning_rate` wins over its. Raises `DataError` for trajectories that
        cannot be trained on, which changes nothing, and the run's own error if it ends.
        """
        live = self._of(model)
        rate = learning_rate if learning_rate is not None else getattr(config, "learning_rate", None)
        rows = convert.rows(list(trajectory_groups))
        async with self._training:
            step = await live.step(rows, rate)
        trained_at = step.record.get("train/learning_rate")
        if rate is not None and trained_at != rate:
            raise MegatronSglangError(f"learning_rate={rate} was asked for, the step was done with {trained_at}")
        return TrainResult(
            step=step.batch + 1,
            weight_version=step.version,
            metrics=step.record,
            checkpoint_path=live.folder / "checkpoints" if self.checkpoints else None,
        )

    async def get_step(self, model: Any) -> int:
        """Train steps in the model's life."""
        async with self._training:
            return (await self._of(model).wanted()).batch

    _get_step = get_step
    """What ART's `model.get_step()` asks for."""

    async def close(self) -> None:
        """End everything that was started; returns when nothing of it runs any more. Idempotent. Waits for a `register`
        that is under way: cancel that to end sooner."""
        async with self._changing:
            await self._close()

    async def _close(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)  # however it ended, the processes must
        live, self._live = self._live, None
        if live is not None:
            self._model.inference_base_url = self._model.inference_api_key = None
            await live.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _prepare_backend_for_training(self, model: Any, config: Any = None) -> tuple[str, str]:
        """What ART's `model.register(backend)` asks for next: URL and key of the endpoint."""
        endpoint = self._of(model).endpoint
        assert endpoint is not None
        return endpoint.base_url, endpoint.api_key

    def _of(self, model: Any) -> Live:
        if self._live is None or self._model is not model:
            raise SetupError(f"model {model.name!r} is not registered; await backend.register(model) first")
        return self._live

    async def _watch(self, live: Live) -> None:
        """Say in the log, once each time, that the endpoint has become ill or well."""
        well = True
        while True:
            await asyncio.sleep(self.sglang_config.health_check_interval)
            assert live.endpoint is not None
            problem = await live.endpoint.problem()
            if problem and well:
                log.warning("%s: %s", self._model.name, problem)
            well = not problem


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
