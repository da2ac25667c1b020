"""Logprobs and entropies over vocabulary shards, in chunks, against log_softmax of all of it in fp64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_sglang.training import logprobs, scores

WORDS = 48


def scored(dtype: str, temperature: float, chunk_rows: int, block: int | None = None) -> dict[str, Any]:
    """Largest differences of values and gradients on this rank, and what Megatron's own cross entropy makes of them.
    block: use the kernel that a GPU would run, with blocks of so many columns."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mpu.initialize_model_parallel(tensor_model_parallel_size=size)
    draw = torch.Generator().manual_seed(3)
    whole = (torch.randn(3, 7, WORDS, generator=draw) * 4).to(getattr(torch, dtype))
    labels = torch.randint(0, WORDS, (3, 7), generator=draw)
    weights, others = torch.randn(3, 7, generator=draw), torch.randn(3, 7, generator=draw)
    mine = slice(dist.get_rank() * WORDS // size, (dist.get_rank() + 1) * WORDS // size)
    scores.CHUNK_BYTES = chunk_rows * 4 * (WORDS // size)
    if block is not None:
        from megatron_sglang.training import score_kernel

        scores._is_on_gpu = lambda _: True
        score_kernel.BLOCK = block
        assert scores._kernel_for(whole) is score_kernel

    exact = whole.double().requires_grad_()
    table = (exact / temperature).log_softmax(-1)
    expected = table.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(table.exp() * table).sum(-1)
    shard = whole[..., mine].clone().requires_grad_()
    before = shard.detach().clone()
    found = logprobs.logprobs_and_entropies(shard, labels, temperature)
    alone = logprobs.token_logprobs(shard, labels, temperature)
    theirs = -vocab_parallel_cross_entropy(before.float().div(temperature), labels)
    report = {
        "logprobs": _apart(found[0], expected[0]),
        "entropies": _apart(found[1], expected[1]),
        "alone": _apart(found[0], alone),
        "megatron": _apart(found[0], theirs),
        "input_kept": torch.equal(shard.detach(), before),
    }
    losses = {"of_logprobs": (weights, None), "of_entropies": (None, others), "of_both": (weights, others)}
    for name, parts in losses.items():
        wanted = sum((part * value).sum() for part, value in zip(parts, expected, strict=True) if part is not None)
        got = sum((part * value).sum() for part, value in zip(parts, found, strict=True) if part is not None)
        [right] = torch.autograd.grad(wanted, [exact], retain_graph=True)
        [gradient] = torch.autograd.grad(got, [shard], retain_graph=True)
        assert gradient.dtype == shard.dtype
        report[name] = _apart(gradient, right[..., mine])
    return report


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
