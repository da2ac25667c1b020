"""Experts and adapters in grouped products: what a GPU computes for a MoE layer, on a CPU by the same functions."""

from __future__ import annotations

import pytest
from conftest import RunRanks


@pytest.mark.parametrize("enabled", [True, False], ids=["policy", "reference"])
def test_grouped_products_are_those_of_bridge(run_ranks: RunRanks, enabled: bool) -> None:
    """Output, gradients of input and adapters, also where experts have no tokens; with adapters switched off."""
    (found,) = run_ranks(1, "cases_grouped.grouped_like_bridge", enabled=enabled)
    assert found["taken"] == [True, False]
    assert max(found["bridge"]) < 1e-2, "bf16 rounds at 4e-3"
    assert max(found["ours"]) < 1e-2
    if enabled:
        assert found["of_idle_experts"] == [0.0] * 4


def test_stacked_weights_stay_the_parameters_they_were(run_ranks: RunRanks) -> None:
    """Names, values and identity; and nothing is computed from memory that a parameter has left."""
    (found,) = run_ranks(1, "cases_grouped.stacked_parameters")
    assert found == {
        "same": True,
        "stacked": True,
        "grouped": True,
        "after_one_moved": False,
        "no_tokens": False,
        "fp32": False,
    }
