"""Micro-batches by a budget of tokens, and packed sequences: pure parts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sglang.batching import MicroBatch, collate, split_by_tokens
from megatron_sglang.errors import ConfigError
from megatron_sglang.packing import micro_batches
from megatron_sglang.types import TrainSample


def sample(length: int, first: int = 1) -> TrainSample:
    """`length` tokens, at least 2, counting up from `first`."""
    ids = tuple(range(first, first + length))
    return TrainSample(ids[: length // 2], ids[length // 2 :], (-0.5,) * (length - length // 2), 1.0, 1.0, 3)


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Lengths, budget, ranks, run."""
    ranks, run = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    return lengths * ranks * run, draw(st.integers(1, 120)), ranks, run


@given(shares())
def test_every_sample_once_within_the_budget_and_as_many_on_all_ranks(share: tuple[list[int], int, int, int]) -> None:
    """A sample twice or never trains something else, one micro-batch more on one rank hangs all of them, and one over
    the budget is out of memory. Virtual pipeline stages take `run` of them at a time."""
    lengths, budget, ranks, run = share
    by_rank = micro_batches(lengths, budget, ranks, run)
    assert len(by_rank) == ranks
    assert len({len(parts) for parts in by_rank}) == 1
    assert len(by_rank[0]) % run == 0
    assert sorted(place for parts in by_rank for part in parts for place in part) == list(range(len(lengths)))
    for part in (part for parts in by_rank for part in parts):
        assert part
        assert len(part) == 1 or sum(lengths[place] for place in part) <= budget
    assert micro_batches(list(lengths), budget, ranks, run) == by_rank


@given(shares())
def test_micro_batches_of_the_same_turn_are_alike(share: tuple[list[int], int, int, int]) -> None:
    """Ranks wait for each other in each turn: the next turn's largest is no larger than this one's smallest."""
    lengths, *sizes = share
    sums = [[sum(lengths[place] for place in part) for part in parts] for parts in micro_batches(lengths, *sizes)]
    turns = list(zip(*sums, strict=True))
    assert all(min(turn) >= max(later) for turn, later in pairwise(turns))


def test_by_hand() -> None:
    """Two ranks, 16 tokens at most: 40 tokens need three micro-batches, and so four, of 11, 10, 10 and 9."""
    assert micro_batches([10, 2, 3, 4, 9, 5, 6, 1], 16, 2) == [[[1, 4], [3, 5]], [[0], [2, 6, 7]]]


def test_a_sample_longer_than_the_budget_is_alone() -> None:
    assert micro_batches([50, 3, 4, 5], 12, 1) == [[[0], [1, 2, 3]]]


def test_a_step_keeps_its_samples_and_rounds_them_up() -> None:
    """What a train step learns from does not depend on lengths; the padding of a sample counts as much as it does."""
    samples = [sample(length) for length in (9, 3, 2, 8, 7, 5, 4, 6)]
    for dp_size in (1, 2):
        by_rank = [
            split_by_tokens(samples, global_batch=4, budget=16, multiple_of=4, dp_rank=rank, dp_size=dp_size)
            for rank in range(dp_size)
        ]
        for step in range(2):
            parts = [part for steps in by_rank for part in steps[step]]
            lengths = sorted(item.length for part in parts for item in part)
            assert lengths == sorted(item.length for item in samples[4 * step : 4 * step + 4])
            assert all(sum(-(-item.length // 4) * 4 for item in part) <= 16 for part in parts)
    with pytest.raises(ConfigError, match="8 samples of a rollout batch do not divide"):
        split_by_tokens(samples, global_batch=3, budget=16, multiple_of=4, dp_rank=0, dp_size=1)


def packed(lengths: list[int], multiple_of: int = 1) -> MicroBatch:
    return collate([sample(length, first=100 * n + 1) for n, length in enumerate(lengths)], multiple_of, packed=True)


def test_the_example_of_the_module() -> None:
    batch = packed([3, 5], multiple_of=2)
    assert batch.spans == (4, 6)
    assert batch.tokens.shape == (2, 6)
    assert batch.lay(batch.tokens).tolist() == [[1, 2, 3, 0, 101, 102, 103, 104, 105, 0]]
    assert batch.lay(batch.labels).tolist() == [[2, 3, 0, 0, 102, 103, 104, 105, 0, 0]]
    assert batch.lay(batch.position_ids).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    assert batch.padding().value() == pytest.approx(0.2)
    padded = collate([sample(3), sample(5)], 2)
    assert padded.lay(padded.tokens) is padded.spread(padded.tokens) is padded.tokens
    assert padded.padding().value() == pytest.approx(1 - 8 / 12)


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=6)


@given(lengths, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_what_is_laid_out_comes_back_with_its_gradient(found: list[int], tp: int, cp: int) -> None:
    """A place off by one gives a sample its neighbour's logprobs, one twice or never a wrong gradient."""
    whole = packed(found, tp * 2 * cp)
    seen = torch.zeros(whole.tokens.shape, dtype=torch.int64)
    for rank in range(cp):
        batch = whole.of_context_rank(rank, cp)
        laid = batch.lay(batch.tokens)
        assert laid.shape == (1, sum(batch.spans) // cp)
        assert laid.shape[1] % tp == 0
        assert torch.equal(batch.spread(laid), batch.tokens)
        values = torch.rand(laid.shape, requires_grad=True)
        (batch.spread(values) * batch.tokens).sum().backward()
        assert values.grad is not None
        assert torch.equal(values.grad, laid.to(values.dtype))
        experts = torch.stack([batch.tokens, batch.position_ids], dim=2)
        assert batch.lay(experts).tolist() == [
            list(map(list, zip(laid[0].tolist(), batch.lay(batch.position_ids)[0].tolist(), strict=True)))
        ]
        for row, width in enumerate(batch.spans):
            places = batch.position_ids[row, : width // cp]
            seen[row].index_add_(0, places, batch.tokens[row, : width // cp])
    assert torch.equal(seen, whole.tokens), "every position is on one context rank"
