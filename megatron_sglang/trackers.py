"""Where metrics go besides the run folder: TensorBoard, Weights & Biases, MLflow. Imported only when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_sglang.errors import ConfigError, SetupError


class Tracker(Protocol):
    def log(self, iteration: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events in <run>/tensorboard; those of an earlier start at or past `first_iteration` are hidden."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=first_iteration)

    def log(self, iteration: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One wandb run per start, grouped by run folder; WANDB_* variables choose project, entity and mode."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        module = _import("wandb", "wandb")
        self._run = module.init(dir=str(folder), group=folder.name, config=dict(config))

    def log(self, iteration: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=iteration)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One MLflow run per start; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME choose where. timing_s/rollout/generate
    is timing_s/rollout.generate there: a store of files has a file for each metric, which cannot be a folder too."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._module = _import("mlflow", "mlflow")
        self._module.start_run(run_name=folder.name)
        self._module.log_dict(dict(config), "config.yaml")

    def log(self, iteration: int, record: Mapping[str, float]) -> None:
        finite = {name: value for name, value in record.items() if math.isfinite(value)}  # its stores refuse others
        sections = ((name.partition("/"), value) for name, value in finite.items())
        self._module.log_metrics(
            {section + slash + name.replace("/", "."): value for (section, slash, name), value in sections},
            step=iteration,
        )

    def close(self) -> None:
        self._module.end_run()


def create_tracker(name: str, folder: Path, config: Mapping[str, Any], first_iteration: int) -> Tracker:
    """The tracker of that name, started. Raises `SetupError` if its package is not installed."""
    match name:
        case "tensorboard":
            return TensorBoard(folder, first_iteration)
        case "wandb":
            return Wandb(folder, config)
        case "mlflow":
            return MLflow(folder, config)
    raise ConfigError(f"log.trackers: {name!r} is unknown; use tensorboard, wandb or mlflow")


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise SetupError(
            f"log.trackers asks for {package}, which is not installed ({error}); "
            f"install it (pip install {package}) or take it off the list"
        ) from error
