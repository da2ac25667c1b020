"""What the forked ranks run for routing replay: the experts of Megatron's own recording, or others, replayed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from cases import randomize, samples, set_up, train_steps
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_sglang import batching
from megatron_sglang.batching import MicroBatch
from megatron_sglang.losses import LossOptions
from megatron_sglang.training import logprobs
from megatron_sglang.training.replay import RoutingReplay
from megatron_sglang.training.step import PolicyStep
from megatron_sglang.types import TrainSample

FLAG = {"moe-enable-routing-replay": True}
LAYERS, TOP_K, EXPERTS = 4, 2, 8


def record(hf: str, count: int) -> list[list[list[int]]]:
    """[samples][tokens but the last][layers x top_k]: what Megatron's own `RouterReplay` records on one rank."""
    _, model, _, _ = set_up(hf, FLAG)
    randomize(model, 0.05)
    told = []
    for sample in samples(count, 400):
        batch = batching.collate([sample])
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        with torch.no_grad():
            logprobs.forward(model[0], batch)
        recorded = torch.stack(RouterReplay.get_recorded_data(), dim=1)  # [S, layers, top_k], in the layers' order
        assert recorded.shape == (sample.length, LAYERS, TOP_K), recorded.shape
        told.append(recorded[:-1].flatten(1).tolist())
    return told


def spoiled(told: list[list[list[int]]]) -> list[list[list[int]]]:
    """Other experts, equally valid: two different ones for each token and layer."""
    draw = random.Random(3)
    return [
        [[number for _ in range(LAYERS) for number in draw.sample(range(EXPERTS), TOP_K)] for _ in tokens]
        for tokens in told
    ]


def with_experts(items: list[TrainSample], told: list[list[list[int]]]) -> list[TrainSample]:
    import base64

    from megatron_sglang.routing import of_engine

    found = []
    for sample, numbers in zip(items, told, strict=True):
        raw = torch.tensor(numbers, dtype=torch.int32).numpy().tobytes()
        routed = of_engine(base64.b64encode(raw).decode(), len(numbers))
        found.append(dataclasses.replace(sample, routed_experts=routed))
    return found


def train(hf: str, layout: dict[str, Any], told: list[list[list[int]]] | None, spoil: bool = False) -> dict[str, Any]:
    """[loss, grad norm] of three train steps, and the share of choices that the routers would have made otherwise."""
    recipe, model, optimizer, scheduler = set_up(hf, layout | ({} if told is None else FLAG))
    randomize(model, 0.05)
    args = recipe.args
    step = PolicyStep("gspo", LossOptions(kl_coef=0.0), temperature=1.0)
    step.replay = RoutingReplay.install(model)
    items = samples(args.global_batch_size, 400)
    if told is not None:
        items = with_experts(items, spoiled(told) if spoil else told)
    by_step = batching.split(
        items,
        global_batch=args.global_batch_size,
        micro_batch=args.micro_batch_size,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
    )
    batches = [batching.collate(part, 8) for part in by_step[0]]
    scored = logprobs.score(model, batches, 1.0, step.replay)
    batches = [batch.with_logprobs(old=batch.rollout_logprobs) for batch in batches]
    curve, metrics = [], []
    for result in train_steps(step, model, optimizer, scheduler, batches, 3):
        if step.replay is not None:
            step.replay.clear()
            metrics.append({name: value.value() for name, value in step.replay.take_metrics().items()})
        curve.append([float(result[0].get("gspo loss", "nan")), float(result[5])])
    return {"curve": curve, "metrics": metrics, "scored": _sum(scored, batches)}


def _sum(scored: list[torch.Tensor], batches: list[MicroBatch]) -> float:
    """Of all logprobs of responses, so that every one of them counts."""
    return sum(float((found.double() * batch.loss_mask).sum()) for found, batch in zip(scored, batches, strict=False))
