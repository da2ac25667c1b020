"""What weights are merged from: shared by both ways of merging them. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Factored(NamedTuple):
    """Weights W of one shape that are adapted together, with their factors; n of them, one but for grouped experts."""

    bases: tuple[torch.Tensor, ...]
    """[out, in] each, of the shard."""
    down: torch.Tensor
    """A: [n, r, in]."""
    up: torch.Tensor
    """B: [n, out, r]."""
