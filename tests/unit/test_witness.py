"""The witness against weights that were delivered but do not compute the same."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sglang.errors import WeightSyncError
from megatron_sglang.sync import require_agreement


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1.3e-4), (torch.bfloat16, 0.05), (torch.float32, math.nan)])
def test_rounding_is_believed(dtype: torch.dtype, gap: float) -> None:
    """TF32 and bf16 are no reason to stop; NaN belongs to the guard, which skips the step."""
    require_agreement(gap, dtype)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 0.3), (torch.bfloat16, 2.0)])
def test_another_model_is_not(dtype: torch.dtype, gap: float) -> None:
    """A rotary base that differs, say: every weight arrives, and the engine still serves another function."""
    with pytest.raises(WeightSyncError, match=r"differ from the trainer's by .* expected at most"):
        require_agreement(gap, dtype)
