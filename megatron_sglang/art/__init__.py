"""ART's Python surface over a training run: `docs/art.md`. Starts processes and speaks HTTP; imports nothing heavy."""

from megatron_sglang.art.backend import SGLangBackend
from megatron_sglang.art.options import DeviceConfig, SGLangConfig
from megatron_sglang.art.records import TrainableModel, TrainConfig, TrainResult, Trajectory, TrajectoryGroup

__all__ = [
    "DeviceConfig",
    "SGLangBackend",
    "SGLangConfig",
    "TrainConfig",
    "TrainResult",
    "TrainableModel",
    "Trajectory",
    "TrajectoryGroup",
]
