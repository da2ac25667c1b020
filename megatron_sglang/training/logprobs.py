"""Logprobs and entropies of given tokens from logits that are split over the vocabulary (Megatron's TP layout).

Shapes: B sequences of a micro-batch, S positions, V_local = V / TP. Under context parallelism S counts a rank's own:
micro-batches are cut where they are made. Of a packed micro-batch the model sees one sequence (B = 1, S = T); what is
said about its labels is spread to [B, S] again (`batching.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.training import get_args

from megatron_sglang.batching import MicroBatch
from megatron_sglang.training.replay import RoutingReplay
from megatron_sglang.training.scores import scores


def token_logprobs(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, temperature: float) -> torch.Tensor:
    """[B, S] fp32 log pi(label | prefix) at `temperature`, differentiable. Logits are this rank's vocabulary shard, of
    any floating dtype."""
    return scores(logits_BSV, labels_BS, temperature, _shards(), entropies=False)[0]


def logprobs_and_entropies(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [B, S] fp32, differentiable: `token_logprobs`, and the entropy (nats) of the distribution there."""
    return scores(logits_BSV, labels_BS, temperature, _shards(), entropies=True)


def _shards() -> torch.distributed.ProcessGroup | None:
    """Over which the vocabulary is split; None where it is not."""
    group: Any = mpu.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def of_labels(logits: torch.Tensor, batch: MicroBatch, temperature: float) -> torch.Tensor:
    """`token_logprobs` [B, S] of what `forward` gives on the last pipeline stage."""
    return batch.spread(token_logprobs(logits, batch.lay(batch.labels), temperature))


def of_labels_and_entropies(
    logits: torch.Tensor, batch: MicroBatch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprobs_and_entropies`, each [B, S], of what `forward` gives on the last pipeline stage."""
    policy, entropy = logprobs_and_entropies(logits, batch.lay(batch.labels), temperature)
    return batch.spread(policy), batch.spread(entropy)


def forward(model: Any, batch: MicroBatch, replay: RoutingReplay | None = None, *, count: bool = False) -> torch.Tensor:
    """Run one model chunk. On the last pipeline stage: logits [B, S, V_local], of a packed batch [1, T, V_local];
    elsewhere the stage's activations.

    replay: send tokens to the batch's experts. count: see `RoutingReplay.of`."""
    packed = {"packed_seq_params": _boundaries(batch)} if batch.packed else {}
    with contextlib.nullcontext() if replay is None else replay.of(model, batch, count=count):
        given = batch.lay(batch.tokens), batch.lay(batch.position_ids), None
        return model(*given, **packed, **_as_computed(model))


def _boundaries(batch: MicroBatch) -> PackedSeqParams:
    """Where one sequence ends and the next begins, counted before context parallelism cuts them.

    A sequence's padding counts as part of it: it comes after all of its tokens, so no token attends to it."""
    ends = torch.tensor([0, *accumulate(batch.spans)], dtype=torch.int32, device=batch.tokens.device)
    longest = max(batch.spans)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _as_computed(model: Any) -> dict[str, bool]:
    """Megatron's wrapper of a bf16 model would copy all logits to fp32."""
    while not isinstance(model, Float16Module):
        model = getattr(model, "module", None)
        if model is None:
            return {}
    return {"fp32_output": False}


@torch.no_grad()
def score(
    model_chunks: list[Any], batches: list[MicroBatch], temperature: float, replay: RoutingReplay | None = None
) -> list[torch.Tensor]:
    """[B, S] logprobs of each micro-batch under the model as it is now; empty except on the last pipeline stage.
    replay: send tokens to the batches' experts; None: the routers choose.

    Collective over TP, PP, EP, which must have as many batches. Their lengths may differ: stages exchange shapes.
    """

    def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def logprobs(logits: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
            return of_labels(logits, batch, temperature)

        return forward(model, batch, replay), logprobs

    for chunk in model_chunks:
        chunk.eval()
    args: Any = get_args()
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators(model_chunks, batches),
        model=model_chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1] * mpu.get_context_parallel_world_size(),
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk in model_chunks:
        chunk.train()
    if replay is not None:
        replay.clear()
    return results if mpu.is_pipeline_last_stage() else []


def iterators(model_chunks: list[Any], batches: list[MicroBatch]) -> Any:
    """Megatron wants an iterator for each virtual pipeline stage."""
    fresh = [iter(batches) for _ in model_chunks]
    return fresh if len(fresh) > 1 else fresh[0]
