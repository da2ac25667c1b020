"""What Megatron's modules keep of a train step that nobody needs after it.

An MoE layer's token dispatcher (0.19.2, core/transformer/moe/token_dispatcher.py:636) keeps the router's probabilities
of its last forward pass, and they keep the graph that made them. Where layers are computed again in the backward pass,
that graph ends in the layer's input, with its gradient: 2 x 80 MB a layer for 20,000 tokens of Qwen3-30B-A3B, 8 GB in
all, which the engine would miss in the rollout.
"""

from __future__ import annotations

from typing import Any

import torch


def drop(model_chunks: list[Any]) -> None:
    """Let go of tensors with a graph that token dispatchers hold. Between train steps; the next forward pass sets them
    anew."""
    for module in (module for chunk in model_chunks for module in chunk.modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        for holder in (dispatcher, getattr(dispatcher, "_comm_manager", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(holder, name, None)
