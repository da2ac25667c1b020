"""Attention over packed sequences where there is no Transformer Engine.

Megatron's `DotProductAttention` refuses packed sequences. Here it gets them side by side, padded for its own time only,
so that a model is called the same way on a CPU and on a GPU, rotary positions start anew with each sequence on both,
and no mask of all tokens by all tokens is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def by_sequence(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`DotProductAttention.forward` that also takes query, key and value [T, heads, head size] with
    `packed_seq_params`, and then gives [T, 1, hidden of this TP rank]."""

    @functools.wraps(forward)
    def packed(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return forward(self, query, key, value, attention_mask, **kwargs)
        assert attention_mask is None, "each sequence gets the causal one"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        padded = [pad_sequence(list(one.split(lengths))) for one in (query, key, value)]  # [S, B, heads, head size]
        found = forward(self, *padded, None, **kwargs)
        return torch.cat([row[:length] for row, length in zip(found.unbind(1), lengths, strict=True)]).unsqueeze(1)

    return packed
