"""A train step with a loss or gradient that is not finite changes nothing; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sglang.errors import DivergedError


class FiniteGuard:
    """Stands between Megatron's backward pass and its optimizer. Collective: all ranks skip, or none.

    bad_steps: skipped steps in a row.
    """

    def __init__(self, optimizer: Any, max_bad_steps: int) -> None:
        self.max_bad_steps, self.bad_steps = max_bad_steps, 0
        self._optimizer_step = optimizer.step
        optimizer.step = self._step

    def watch(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_backward` that also looks at what came out of it."""

        def watched(*args: Any, model: list[Any], **kwargs: Any) -> Any:
            losses = forward_backward(*args, model=model, **kwargs)
            parts = [value for report in losses for value in report.values()]
            parts += [buffer.grad_data for chunk in model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
            finite = all(bool(part.isfinite().all()) for part in parts)
            worst = torch.tensor([0.0 if finite else 1.0], device=torch.cuda.current_device())
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            self.bad_steps = self.bad_steps + 1 if worst.item() else 0
            return losses

        return watched

    def check(self) -> None:
        """DivergedError, on all ranks alike, after `max_bad_steps` skipped steps in a row."""
        if self.bad_steps >= self.max_bad_steps:
            raise DivergedError(
                f"{self.bad_steps} train steps in a row had a loss or gradient that is not finite; no update was made "
                "and nothing was published; lower --lr or look at the last rollouts"
            )

    def _step(self) -> tuple[bool, float | None, int | None]:
        if self.bad_steps:
            return False, None, None
        return self._optimizer_step()
