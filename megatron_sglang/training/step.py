"""Megatron's forward step with a policy loss. All of the maths is in `losses.py`; this adapts it to Megatron."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch.distributed.nn.functional import all_reduce

from megatron_sglang.batching import MicroBatch
from megatron_sglang.losses import LossOptions, policy_loss
from megatron_sglang.metrics import Metric
from megatron_sglang.training import logprobs
from megatron_sglang.training.replay import RoutingReplay


def sum_over_context(part: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks that hold parts of the same sequences; gradients are added over them too."""
    group: Any = mpu.get_context_parallel_group()
    return part if group.size() == 1 else all_reduce(part, group=group)


class PolicyStep:
    """Gives Megatron its `forward_step_func`, and keeps the metrics of the micro-batches it saw.

    Megatron runs with `--calculate-per-token-loss`: it adds up (loss_sum, denominator) over micro-batches and
    data-parallel ranks and divides once, so a denominator that counts sequences gives GSPO's mean over sequences.
    """

    def __init__(self, loss: str, options: LossOptions, temperature: float) -> None:
        self.loss, self.options, self.temperature = loss, options, temperature
        self.replay: RoutingReplay | None = None
        """Set when the model is built, where the engine's routing is to be replayed."""
        self._metrics: list[dict[str, Metric]] = []

    def forward_step(self, iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Output of this pipeline stage, and what turns it into a loss on the last one."""
        batch = next(iterator)
        return logprobs.forward(model, batch, self.replay, count=True), functools.partial(self._loss, batch)

    def _loss(
        self, batch: MicroBatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        policy, entropy = logprobs.of_labels_and_entropies(logits, batch, self.temperature)
        if not self.options.entropy_coef:
            entropy = entropy.detach()
        outputs = policy_loss(self.loss, batch.loss_inputs(policy, entropy), self.options, sum_over_context)
        self._metrics.append({**outputs.metrics, "train/padding": batch.padding()})
        denominator = outputs.denominator.to(torch.int)
        report = torch.stack([outputs.loss_sum.detach(), denominator.float()])
        return outputs.loss_sum, denominator, {f"{self.loss} loss": report}

    def take_metrics(self) -> list[dict[str, Metric]]:
        """Metrics of the micro-batches since the last call; empty except on the last pipeline stage."""
        taken, self._metrics = self._metrics, []
        return taken
