"""Sequences cut over context-parallel ranks: what a rank holds, and that loss and gradient stay what they were."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("loss", ["gspo", "gspo_token", "grpo"])
def test_cut_sequences_give_the_same_gradient(run_ranks, loss: str) -> None:
    """A sequence ratio of half a sequence, or a gradient that is counted twice, trains something else. Attention is not
    in it: a CPU has none for cut sequences."""
    [whole] = run_ranks(1, "cases_context.bigram", loss=loss)
    assert max(map(abs, whole["gradient"])) > 1e-3
    for size, packed in ((1, True), (2, False), (4, False), (2, True)):
        for found in run_ranks(size, "cases_context.bigram", loss=loss, packed=packed):
            assert found["gradient"] == pytest.approx(whole["gradient"], rel=1e-6, abs=1e-7)
            assert found["as_megatron_cuts"]
            assert found["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)
