"""Which samples of a train step share a micro-batch, by a budget of tokens, on all data-parallel ranks. No torch.

Every rank knows the lengths of all samples and so computes everyone's micro-batches, without a word to the others.
What all must have alike is their number: the experts' all-to-all and the pipeline's exchanges happen in each of them.

The number is the smallest for which longest-first (Graham 1969, "Bounds on Multiprocessing Timing Anomalies": the
longest sample left goes to the micro-batch with the fewest tokens) keeps the budget; the same rule makes them even.
Then they are dealt out by size, in turns forwards and backwards, so that ranks work on equal ones at the same time and
have equal sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import batched


def aligned(length: int, multiple_of: int) -> int:
    """The next multiple."""
    return -(-length // multiple_of) * multiple_of


def micro_batches(lengths: Sequence[int], budget: int, ranks: int, run: int = 1) -> list[list[list[int]]]:
    """[ranks][micro-batches][places in `lengths`], as many micro-batches on each rank, none empty, the largest first.

    No more than `budget` tokens in each, but for a sample that is longer by itself, which gets one of its own. Their
    number is a multiple of `run`: so many at a time go through virtual pipeline stages.
    """
    assert lengths, "there is something to train on"
    assert len(lengths) % (ranks * run) == 0, f"{len(lengths)} samples on {ranks} ranks in runs of {run}"
    fewest = aligned(-(-sum(min(length, budget) for length in lengths) // (budget * ranks)), run)
    tries = (_even(lengths, count * ranks) for count in range(fewest, len(lengths) // ranks + 1, run))
    parts = next(
        parts
        for parts in tries
        if all(len(part) == 1 or sum(lengths[place] for place in part) <= budget for part in parts)
    )
    parts.sort(key=lambda part: (-sum(lengths[place] for place in part), part))
    rounds = [row if number % 2 == 0 else row[::-1] for number, row in enumerate(batched(parts, ranks))]
    return [[row[rank] for row in rounds] for rank in range(ranks)]


def _even(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` parts with sums as equal as longest-first makes them, each in the samples' order; none is empty where
    there are samples enough."""
    fewest = [(0, number) for number in range(count)]
    parts: list[list[int]] = [[] for _ in fewest]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        tokens, number = heapq.heappop(fewest)
        parts[number].append(place)
        heapq.heappush(fewest, (tokens + lengths[place], number))
    return [sorted(part) for part in parts]
