"""What the loss is made of, computed a chunk of positions at a time over shards of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("ranks", "dtype", "temperature", "chunk_rows"),
    [(1, "float32", 1.0, 1000), (1, "float32", 0.7, 4), (2, "float32", 0.7, 1), (2, "bfloat16", 1.0, 5)],
)
def test_chunks_and_shards_change_nothing(run_ranks, ranks, dtype, temperature, chunk_rows) -> None:
    """A chunk that is left out, a shard's own maximum, or a gradient through the wrong temperature would train on
    something else without a word."""
    rounding = 2e-6 if dtype == "float32" else 8e-3  # of a gradient in the logits' dtype
    found = run_ranks(ranks, "cases_logprobs.scored", dtype=dtype, temperature=temperature, chunk_rows=chunk_rows)
    all_close(found, rounding)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_kernels_sums_are_reduced_alike(run_interpreting_ranks, ranks) -> None:
    """They are counted from a shard's own peak, and are moved to that of all shards afterwards."""
    arguments = {"dtype": "float32", "temperature": 0.7, "chunk_rows": 1, "block": 16}
    all_close(run_interpreting_ranks(ranks, "cases_logprobs.scored", **arguments), 2e-6)


def all_close(ranks: list[dict[str, Any]], rounding: float) -> None:
    for found in ranks:
        assert found.pop("input_kept")
        for name, apart in found.items():
            assert apart < (rounding if name.startswith("of_") else 1e-5), (name, apart)
