"""What the forked ranks run to look into a train step from the inside."""

from __future__ import annotations

import gc
from typing import Any

import torch
from cases import run

from megatron_sglang.training import logprobs
from megatron_sglang.training.plugin import Plugin


def graphs_left(argv: list[str]) -> list[int]:
    """A whole run; after each train step, how many tensors of this process still hold a part of an autograd graph.
    Those that Megatron's optimizer made of its buffers are for good."""
    found, original = [], Plugin._note_training

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        graphs = [type(one.grad_fn).__name__ for one in tensors if one.grad_fn is not None]
        found.append(sum(name != "AsStridedBackward0" for name in graphs))
        original(self, *args, **kwargs)

    Plugin._note_training = note  # type: ignore[method-assign]
    failure = run(argv)
    assert not failure, failure
    return found


def scored(argv: list[str], *, all_steps: bool) -> list[int]:
    """A whole run; how many micro-batches were scored each time. all_steps: old logprobs for every train step, where
    the plugin leaves out the first."""
    counts, score, with_logprobs = [], logprobs.score, Plugin._with_logprobs

    def counted_score(model: list[Any], batches: list[Any], *args: Any) -> list[torch.Tensor]:
        counts.append(len(batches))
        return score(model, batches, *args)

    def with_all(self: Any, cycle: Any, by_step: list[list[Any]]) -> list[list[Any]]:
        found = with_logprobs(self, cycle, by_step)
        old = score(self.model, found[0], self.config.rollout.temperature, None)
        return [[batch.with_logprobs(old=old[i]) for i, batch in enumerate(found[0])], *found[1:]]

    logprobs.score = counted_score
    if all_steps:
        Plugin._with_logprobs = with_all  # type: ignore[method-assign]
    failure = run(argv)
    assert not failure, failure
    return counts
