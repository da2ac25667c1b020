"""The records of ART's surface, by ART's names. Objects of the `openpipe-art` package serve as well: only the fields
below are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sglang.errors import SetupError

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(slots=True)
class TrainableModel:
    """A model under training. `SGLangBackend.register` fills the `inference_` fields."""

    name: str
    project: str
    base_model: str
    """Hugging Face folder, or a name on the hub that is downloaded or cached."""
    base_path: str = "./.art"
    """Everything of the model is in BASE_PATH/PROJECT/NAME."""
    inference_base_url: str | None = None
    inference_api_key: str | None = field(default=None, repr=False)
    inference_model_name: str | None = None

    def get_inference_name(self) -> str:
        """What to give as `model` in requests."""
        return self.inference_model_name or self.name

    def openai_client(self) -> AsyncOpenAI:
        """A client of the model's endpoint that asks for what training needs (`client.py`) in each request."""
        if self.inference_base_url is None or self.inference_api_key is None:
            raise SetupError(f"model {self.name!r} has no endpoint; await backend.register(model) first")
        from megatron_sglang.art.client import openai_client

        return openai_client(self.inference_base_url, self.inference_api_key)


@dataclass(slots=True)
class Trajectory:
    """One rollout: messages as dictionaries and, where the model spoke, the `Choice` objects that the endpoint gave."""

    messages_and_choices: list[Any] = field(default_factory=list)
    reward: float = 0.0
    metrics: dict[str, float | int | bool] = field(default_factory=dict)
    """"passed" is counted in rollout/pass_rate; without it a reward of 1 or more is."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class TrajectoryGroup:
    """Trajectories of one task, whose rewards are compared with each other."""

    trajectories: list[Trajectory] = field(default_factory=list)

    def __init__(self, trajectories: Iterable[Trajectory]) -> None:
        self.trajectories = list(trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Options of one call of `train`."""

    learning_rate: float | None = None
    """None: that of the call before, at first `megatron.lr` of the backend's options."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What one call of `train` did. The new weights are served when it is returned."""

    step: int
    """Calls of `train` in the model's life, those of earlier processes included."""
    weight_version: int
    """Of what is served now."""
    metrics: Mapping[str, float]
    """The run's record of it: train/*, rollout/*, sync/*, timing_s/*."""
    checkpoint_path: Path | None = None
    """Folder of Megatron's checkpoints, the newest of which is this step's; None: checkpoints are off."""


def trajectories_of(group: Any) -> Sequence[Any]:
    """The trajectories of a `TrajectoryGroup`, ART's or ours, or of any sequence of them."""
    return list(getattr(group, "trajectories", group))
