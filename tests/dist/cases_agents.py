"""What ranks run for multi-turn rollouts; see `cases.py`."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from cases import logits, mpu, randomize, run, set_up, train_steps

from megatron_sglang import batching
from megatron_sglang.losses import LossOptions
from megatron_sglang.training import plugin
from megatron_sglang.training.plugin import Plugin
from megatron_sglang.training.step import PolicyStep
from megatron_sglang.types import TrainSample

CLIP = (0.05, 0.1)


def trajectories(count: int) -> list[TrainSample]:
    """Two turns with an observation between them, the last one ended by a masked token; old tokens masked in some."""
    draw, made = random.Random(11), []
    for number in range(count):
        mask = [1] * draw.randint(1, 9) + [0] * draw.randint(1, 12) + [1] * draw.randint(1, 9) + [0]
        mask = [0] * len(mask) if number == 3 else mask
        ids = tuple(draw.randrange(5, 400) for _ in mask)
        logprobs = tuple(-draw.random() * 4 if m else 0.0 for m in mask)
        prompt = tuple(draw.randrange(5, 400) for _ in range(draw.randint(5, 40)))
        made.append(TrainSample(prompt, ids, logprobs, draw.gauss(0, 1), 0.0, 1, tuple(mask)))
    return made


def masked_loss(hf: str, layout: dict[str, Any], loss: str) -> dict[str, float]:
    """The loss Megatron reports for multi-turn samples, and the same from the full logits of each by itself."""
    recipe, model, optimizer, scheduler = set_up(hf, layout)
    randomize(model, 0.2)
    args = recipe.args
    samples = trajectories(args.global_batch_size)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    aggregation = "token_mean" if loss == "grpo" else "sequence_mean"
    by_hand, weights = 0.0, 0
    for sample in samples:
        found = logits(model, torch.tensor([sample.prompt_ids_T + sample.response_ids_T]))
        assert found is not None
        start = len(sample.prompt_ids_T) - 1
        logprobs = found[0].log_softmax(-1)[start:-1].gather(1, torch.tensor(sample.response_ids_T)[:, None])[:, 0]
        places = [place for place, m in enumerate(sample.loss_mask_T) if m]
        ratios = [float(logprobs[place]) - sample.rollout_logprobs_T[place] for place in places]
        if not places:
            continue
        if loss == "gspo":
            ratios = [sum(ratios) / len(places)]
        terms = []
        for log_ratio in ratios:
            ratio = float(torch.tensor(log_ratio).exp())
            clipped = min(max(ratio, 1 - CLIP[0]), 1 + CLIP[1])
            terms.append(-min(ratio * sample.advantage, clipped * sample.advantage))
        by_hand += sum(terms)
        weights += len(terms)
    split = batching.split(
        samples, global_batch=len(samples), micro_batch=args.micro_batch_size, dp_rank=rank, dp_size=size
    )
    batches = [batching.collate(part, 8) for part in split[0]]
    batches = [batch.with_logprobs(old=batch.rollout_logprobs) for batch in batches]
    step = PolicyStep(loss, LossOptions(clip_low=CLIP[0], clip_high=CLIP[1], aggregation=aggregation), temperature=1.0)
    [result] = train_steps(step, model, optimizer, scheduler, batches, 1)
    return {"megatron": float(result[0][f"{loss} loss"]), "by hand": by_hand / weights, "norm": float(result[5])}


def compared(argv: list[str], kill_at: int | None = None) -> list[bool]:
    """A whole run; for each train step, whether the engine's logprobs were held against the trainer's. The scriptable
    engine's are made up, so its name is hidden while that is decided, and nothing comes of it."""
    found: list[bool] = []
    original = Plugin._note_training

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(False)
        config = self.config
        self.config = replace(config, rollout=replace(config.rollout, engine="sglang"))
        try:
            original(self, *args, **kwargs)
        finally:
            self.config = config

    def require(gap: float, dtype: torch.dtype) -> None:
        found[-1] = True

    Plugin._note_training, plugin.require_agreement = note, require  # type: ignore[method-assign]
    failure = run(argv, kill_at)
    assert not failure, failure
    return found
