"""Whole runs in Megatron's loop whose batches come from another process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_training import ALONE, argv, records

from megatron_sglang.art.feeding import Feeding
from megatron_sglang.errors import EngineDiedError
from megatron_sglang.feed.batch import Wanted
from megatron_sglang.feed.door import NAME

pytestmark = pytest.mark.dist


@contextlib.contextmanager
def giver(folder: Path, multiples: Sequence[int]) -> Iterator[list[Wanted]]:
    """Feeds the run of `folder`, each time this multiple of the groups of a train step; what the run asked for."""
    asked: list[Wanted] = []

    async def give() -> None:
        feeding = await Feeding.open(folder / NAME)
        with contextlib.suppress(EngineDiedError):  # the run has ended
            for multiple in multiples:
                asked.append(wanted := await feeding.wanted())
                await feeding.give([group(wanted, number) for number in range(multiple * wanted.groups)], None)
            await feeding.wanted()

    thread = threading.Thread(target=asyncio.run, args=(give(),), daemon=True)
    thread.start()
    yield asked
    thread.join(timeout=60)


def group(wanted: Wanted, number: int) -> list[dict]:
    def row(member: int) -> dict:
        ids, mask, logprobs = [5, 6, 7 + number, 8 + member], [0, 0, 1, 1], [0.0, 0.0, -1.0, -1.0]
        told = {"reward": float(member), "passed": False, "text": "x", "turns": 1, "finish_reason": "stop"}
        return {"ids": ids, "mask": mask, "logprobs": logprobs, "version": wanted.version, **told}

    return [row(member) for member in range(wanted.members)]


def test_what_is_given_after_a_resume_amid_a_batch_is_all_trained_on(run_ranks, tmp_path):
    """Whoever feeds gives another batch than the one that was cut off. Were it taken for what was left of that one, its
    first train steps would be left out, and a batch of one step would end the run."""
    run = tmp_path / "run"
    save = [f"--save={tmp_path / 'checkpoint'}", "--save-interval=1", f"--load={tmp_path / 'checkpoint'}"]
    fed = argv(run, *ALONE, *save, "rollout.environment={name: feed}", "rollout.batches=4")
    with giver(run, [2]) as before, pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, "run", argv=fed, kill_at=1)
    with giver(run, [1, 2]) as after:
        assert run_ranks(1, "run", argv=fed) == [""]
    assert [wanted.batch for wanted in (*before, *after)] == [0, 0, 1]
    assert before[0].version < after[0].version, "what was sampled by other weights must not be taken"
    assert [number for number, record in records(run).items() if "train/loss" in record] == [0, 1]


def test_a_batch_of_more_train_steps_than_are_left_has_its_record(run_ranks, tmp_path):
    """It was that of the batch after it, which there is none of."""
    run = tmp_path / "run"
    fed = argv(run, *ALONE, "rollout.environment={name: feed}", "rollout.batches=2")
    with giver(run, [1, 2]):
        assert run_ranks(1, "run", argv=fed) == [""]
    assert ["train/loss" in record for record in records(run).values()] == [True, True, False]
