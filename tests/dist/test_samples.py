"""A rollout batch's samples on two gloo ranks: the same everywhere, with or without experts; errors on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_cycle import two_ranks

from megatron_sglang.comm import TorchComm
from megatron_sglang.errors import EngineError, MegatronSglangError
from megatron_sglang.samples import to_all
from megatron_sglang.types import RoutedExperts, TrainSample

NUMBERS = 4 * 2  # layers x top_k


def made(lengths: list[int], widths: list[int]) -> list[TrainSample]:
    """Width 0: without experts."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for number, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        numbers = torch.randint(0, 256, (length - 1, NUMBERS * width), generator=draw, dtype=torch.uint8)
        routed = RoutedExperts(length - 1, width, numbers.numpy().tobytes()) if width else None
        ids = tuple(range(number, number + length))
        mask = (1, 0) if number % 2 else ()
        found.append(TrainSample(ids[:-2], ids[-2:], (-0.1, -1 / 3), 2 / 3, 1.0, number, mask, routed))
    return found


BATCHES = {
    "experts": made([3, 9, 40], [1, 1, 1]),
    "wide": made([3, 9, 40], [1, 2, 1]),
    "some": made([3, 9, 40], [0, 1, 0]),
    "none": made([3, 9], [0, 0]),
    "large": made([1 << 17, 3], [1, 2]),
    "empty": [],
}


def _share(_folder: Path) -> Any:
    comm = TorchComm(timeout_s=60)
    for name, expected in BATCHES.items():
        asked: list[int] = []

        def produce(expected: Any = expected, asked: list[int] = asked) -> list[TrainSample]:
            asked.append(dist.get_rank())
            return expected

        found = to_all(comm, produce)
        assert found == expected, name
        assert asked == ([0] if comm.rank == 0 else []), "only the leader samples"
        assert all(isinstance(sample.loss_mask_T, tuple) for sample in found)
    return True


def test_samples_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """Bytes at another sample's place would be experts that exist, and nothing would complain."""
    assert any(sample.routed_experts for sample in BATCHES["some"])
    assert two_ranks(_share, tmp_path) == [True, True]


def _fail(_folder: Path) -> Any:
    comm, texts = TorchComm(timeout_s=60), []
    samples = BATCHES["experts"]

    def breaks() -> list[TrainSample]:
        raise EngineError("the engine is gone")

    try:
        to_all(comm, breaks)
    except MegatronSglangError as error:
        texts.append(f"{type(error).__name__}: {error}")
    return [texts, to_all(comm, lambda: samples) == samples]


def test_an_error_of_the_leader_reaches_all_and_the_next_batch_comes(tmp_path: Path) -> None:
    """A rank that waits for experts which nobody sends would wait for an hour."""
    for texts, again in two_ranks(_fail, tmp_path):
        assert texts == ["EngineError: the engine is gone"]
        assert again
