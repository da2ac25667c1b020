"""What merged weights are made from, for both ways of merging: by torch (`merge.py`) and by kernel (`merge_kernel.py`).
Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Factored(NamedTuple):
    """n weights W of one shape and their factors: W + (alpha/r) B A. n is 1, or the number of grouped experts."""

    bases: tuple[torch.Tensor, ...]
    """W: [out, in] each, this rank's shard."""
    down: torch.Tensor
    """A: [n, r, in]."""
    up: torch.Tensor
    """B: [n, out, r]."""
