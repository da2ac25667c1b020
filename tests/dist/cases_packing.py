"""What the forked ranks run for packed micro-batches: old and reference logprobs, then a train step on each half."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import randomize, samples, set_up, train_steps
from cases_replay import FLAG, spoiled, with_experts
from megatron.core import parallel_state as mpu

from megatron_sglang import metrics
from megatron_sglang.batching import MicroBatch
from megatron_sglang.losses import LossOptions
from megatron_sglang.training import logprobs, lora
from megatron_sglang.training.micro_batches import of_this_rank
from megatron_sglang.training.replay import RoutingReplay
from megatron_sglang.training.step import PolicyStep

SAMPLES = 32


def train(hf: str, layout: dict[str, Any], folder: str, told: list[Any] | None = None) -> dict[str, Any]:
    """On every rank; losses and metrics are those of the last pipeline stage. What this rank's optimizer gets in each
    step goes into `folder`."""
    layout = {"global-batch-size": SAMPLES // 2} | layout | ({} if told is None else FLAG)
    recipe, model, optimizer, scheduler = set_up(hf, layout)
    randomize(model, 0.05)
    step = PolicyStep("gspo", LossOptions(kl_coef=0.1, entropy_coef=0.01, tis="token"), temperature=0.7)
    step.replay = RoutingReplay.install(model)
    items = samples(SAMPLES, 400)
    if told is not None:
        items = with_experts(items, spoiled(told))
    by_step = of_this_rank(items, recipe.args)
    flat = [batch for part in by_step for batch in part]
    old = logprobs.score(model, flat, 0.7, step.replay)
    with lora.disabled(model):
        ref = logprobs.score(model, flat, 0.7)
    # Ratios differ from 1 from sample to sample, and clips take some of them.
    known = [
        batch.with_logprobs(old=old[n] + 1e-3 * batch.rollout_logprobs, ref=ref[n]) if old else batch
        for n, batch in enumerate(flat)
    ]
    gradients: list[torch.Tensor] = []
    optimizer_step = optimizer.step

    def noted() -> Any:
        gradients.append(torch.cat(list(_own_gradients(model))))
        return optimizer_step()

    optimizer.step = noted
    curve, rows, rest = [], [], iter(known)
    for part in by_step:
        batches = [next(rest) for _ in part]
        for result in train_steps(step, model, optimizer, scheduler, batches, 1):
            curve.append([float(result[0].get("gspo loss", math.nan)), float(result[5])])
        rows.append(_metrics(step))
    torch.save(gradients, Path(folder, f"{torch.distributed.get_rank()}.pt"))
    return {
        "curve": curve,
        "metrics": rows,
        "scored": {name: _by_sample(flat, found) for name, found in (("old", old), ("ref", ref))},
        "micro_batches": [len(part) for part in by_step],
        "tokens": [sum(batch.spans) for batch in flat],
        "packed": flat[0].packed,
    }


def _own_gradients(model: list[Any]) -> Iterator[torch.Tensor]:
    """The parts that this rank's share of the distributed optimizer reads."""
    for chunk in model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                yield bucket.grad_data.chunk(group.size())[group.rank()].clone()


def _metrics(step: PolicyStep) -> dict[str, float]:
    taken = step.take_metrics()
    found = taken if mpu.get_tensor_model_parallel_rank() == 0 else []
    if step.replay is not None:
        step.replay.clear()
        found.append(step.replay.take_metrics())
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, [metrics.to_rows(part) for part in found])
    return metrics.values(metrics.merge(metrics.from_rows(row) for rank in everyone for row in rank))


def _by_sample(batches: list[MicroBatch], scored: list[torch.Tensor]) -> dict[str, float]:
    """Advantage, which is nobody else's -> the sum of the response's logprobs."""
    return {
        repr(advantage): float((values.double() * mask).sum())
        for batch, found in zip(batches, scored, strict=False)
        for advantage, values, mask in zip(batch.advantages.tolist(), found, batch.loss_mask, strict=True)
    }
