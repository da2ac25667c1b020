"""The tiny model of examples/tiny_fim learns through ART's Python surface, on a CPU: docs/art.md.

    python examples/art_tiny.py

This script samples and scores by itself: it asks the backend's endpoint with the official `openai` client, runs the
problems' tests with `megatron_sglang.rewards`, and gives groups of trajectories to `backend.train`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sglang.art import SGLangBackend, TrainableModel, TrainConfig, Trajectory, TrajectoryGroup
from megatron_sglang.prompts.source import load_prompts, load_tokenizer
from megatron_sglang.rewards import create_reward
from megatron_sglang.types import Completion, Prompt, Score

if TYPE_CHECKING:
    from megatron_sglang.interfaces import Reward

TASK = Path(__file__).parent / "tiny_fim"
GROUPS, MEMBERS = 16, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"max_prompt_tokens": 72},
    "rollout": {"prompts_per_batch": GROUPS, "samples_per_prompt": MEMBERS, "max_new_tokens": 24},
    "megatron": {"micro-batch-size": 64, "weight-decay": 0, "adam-beta2": 0.95},
}
"""Sections of docs/configuration.md."""


async def sample(client: Any, model: TrainableModel, prompts: Sequence[Prompt], n: int) -> list[list[Any]]:
    """`n` choices for each prompt. The tiny tokenizer has no chat template, so prompts go as token ids."""
    name = model.get_inference_name()
    answers = await asyncio.gather(
        *(client.completions.create(model=name, prompt=list(one.token_ids_T), n=n, max_tokens=24) for one in prompts)
    )
    return [answer.choices for answer in answers]


def judge(reward: Reward, prompts: Sequence[Prompt], choices: Sequence[Sequence[Any]]) -> list[list[Score]]:
    """Run the tests of each problem on each answer to it."""
    pairs = [
        (prompt, Completion(tuple(one.token_ids), tuple(one.logprobs.token_logprobs), one.finish_reason, 0, one.text))
        for prompt, answers in zip(prompts, choices, strict=True)
        for one in answers
    ]
    scores = iter(reward.score(pairs))
    return [[next(scores) for _ in answers] for answers in choices]


async def pass_rate(client: Any, model: TrainableModel, reward: Reward, prompts: Sequence[Prompt]) -> float:
    """Share of held-out problems that one answer to each solves."""
    scores = await asyncio.to_thread(judge, reward, prompts, await sample(client, model, prompts, 1))
    return sum(score.passed for [score] in scores) / len(scores)


async def run(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(TASK / "model")
    train, held_out = (
        load_prompts(TASK / name, tokenizer, max_prompt_tokens=72).prompts for name in ("train.jsonl", "heldout.jsonl")
    )
    held_out, chooser = held_out[: args.held_out], random.Random(0)
    model = TrainableModel("tiny-fim", "examples", base_model=str(TASK / "model"), base_path=args.base_path)
    reward = create_reward("fim_python", all_pure=True)
    start = time.monotonic()

    def clock() -> float:
        return time.monotonic() - start

    try:
        async with SGLangBackend(options=OPTIONS, checkpoints=False) as backend:
            await backend.register(model)
            print(f"{model.inference_base_url} after {clock():.0f} s", *backend.notes, sep="\n  ")
            async with model.openai_client() as client:
                before = await pass_rate(client, model, reward, held_out)
                for _ in range(args.steps):
                    prompts = chooser.sample(train, GROUPS)
                    choices = await sample(client, model, prompts, MEMBERS)
                    scores = await asyncio.to_thread(judge, reward, prompts, choices)
                    groups = [
                        TrajectoryGroup(
                            Trajectory(
                                [{"role": "user", "content": tokenizer.decode(prompt.token_ids_T)}, choice], score.value
                            )
                            for choice, score in zip(answers, found, strict=True)
                        )
                        for prompt, answers, found in zip(prompts, choices, scores, strict=True)
                    ]
                    result = await backend.train(model, groups, TrainConfig(learning_rate=args.learning_rate))
                    metrics = result.metrics
                    print(
                        f"step {result.step}: reward {metrics['rollout/reward']:.3f}, "
                        f"loss {metrics['train/loss']:+.4f}, "
                        f"weight version {result.weight_version}, {clock():.0f} s",
                        flush=True,
                    )
                after = await pass_rate(client, model, reward, held_out)
        print(f"held-out pass rate {before:.3f} -> {after:.3f}, {len(held_out)} problems, {clock():.0f} s")
    finally:
        reward.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=288, help="problems to measure the pass rate on")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--base-path", default="./.art", help="where the model's folder is made")
    asyncio.run(run(parser.parse_args()))
