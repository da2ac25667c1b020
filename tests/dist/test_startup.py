"""The start of a rank, most of which is the import of Megatron."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.dist


def test_a_rank_imports_no_package_that_it_does_not_use(run_ranks):
    """scikit-learn, wandb and torch's compiler were a third of a rank's start. They stay out while Megatron is imported
    and only then: a reward function or a tracker that needs them runs in the same process."""
    [found] = run_ranks(1, "cases_startup.after_imports")
    assert found == {
        "loaded": [],
        "assisted generation": True,
        "found": True,
        "compiler": "torch",
        "collecting": True,
    }
