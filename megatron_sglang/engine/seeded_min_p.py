"""min_p beside seeded sampling, in every rank of the engine.

SGLang (0.5.17, layers/sampler.py) asserts that they do not meet ("probs should be re-normalized"), and the assertion
ends the engine. Its seeded draw is the largest of log p + Gumbel noise, which does not change when p is scaled, so the
tokens below the threshold may simply be taken out before. Their order against top_k and top_p does not matter: what is
taken out comes last in both.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

_SAMPLER = "sglang.srt.layers.sampler"
_NAME = "top_k_top_p_min_p_sampling_from_probs_torch"


def install() -> None:
    """Idempotent; does nothing outside of SGLang's ranks."""
    sampler = sys.modules.get(_SAMPLER)
    original = getattr(sampler, _NAME, None)
    if original is not None and not hasattr(original, "__wrapped__"):
        setattr(sampler, _NAME, _with_min_p(original))


def _with_min_p(original: Any) -> Any:
    @functools.wraps(original)
    def sample(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        sampling_seed: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """probs: [batch, vocabulary]; min_ps: [batch]."""
        if need_min_p_sampling and sampling_seed is not None:
            threshold = probs.amax(dim=-1, keepdim=True) * min_ps.view(-1, 1)
            probs, need_min_p_sampling = probs.masked_fill(probs < threshold, 0.0), False
        return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)

    return sample
