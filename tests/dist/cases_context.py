"""Context parallelism without attention, which Megatron has on a GPU only: all else that is done to cut sequences."""

from __future__ import annotations

from typing import Any

import cases
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_sglang import batching, metrics
from megatron_sglang.losses import LossOptions
from megatron_sglang.training.step import PolicyStep

WORDS = 40


def bigram(loss: str, packed: bool = False) -> dict[str, Any]:
    """One train step of a table of logits by token, cut over all ranks as one context: loss, gradient and metrics as
    Megatron adds them up. packed: the model sees each micro-batch as one sequence."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mpu.initialize_model_parallel(context_parallel_size=size)
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(3)).requires_grad_()
    samples = cases.samples(6, WORDS)
    step = PolicyStep(loss, LossOptions(kl_coef=0.1, entropy_coef=0.01, tis="token"), temperature=0.7)
    tokens = 0
    for start in (0, 3):
        whole = batching.collate(samples[start : start + 3], 8 * size, packed=packed)
        whole = whole.with_logprobs(old=whole.rollout_logprobs, ref=whole.rollout_logprobs * 1.1)
        batch = whole.of_context_rank(mpu.get_context_parallel_rank(), size)
        output, turn = step.forward_step(iter([batch]), lambda tokens, *_, **__: table[tokens])
        loss_sum, denominator, _ = turn(output)
        loss_sum.backward()
        tokens += int(denominator)
    gradient = table.grad
    assert gradient is not None
    counted = torch.tensor(tokens)
    dist.all_reduce(gradient)  # as finalize_model_grads does: sums over the data and context parallel ranks,
    dist.all_reduce(counted)  # divided by the sum of what they report
    rows: list[Any] = [None] * size
    dist.all_gather_object(rows, [metrics.to_rows(part) for part in step.take_metrics()])
    merged = metrics.merge(metrics.from_rows(row) for rank in rows for row in rank)
    uncut = whole.lay(whole.tokens)
    group = mpu.get_context_parallel_group()
    if packed:  # Megatron leaves that to a kernel of Transformer Engine (thd_get_partitioned_indices): each by itself
        pieces = [sequence.chunk(2 * size) for sequence in uncut[0].split(list(whole.spans))]
        mine = [piece for cut in pieces for piece in (cut[group.rank()], cut[2 * size - 1 - group.rank()])]
        theirs = torch.cat(mine).unsqueeze(0)
    else:
        theirs = get_batch_on_this_cp_rank({"tokens": uncut}, is_hybrid_cp=False, cp_group=group)["tokens"]
    return {
        "gradient": (gradient / counted).flatten().tolist(),
        # Padding is not the same: lengths are rounded up for the ranks that cut them.
        "metrics": {name: value for name, value in metrics.values(merged).items() if name != "train/padding"},
        "as_megatron_cuts": torch.equal(theirs, batch.lay(batch.tokens)),
    }
