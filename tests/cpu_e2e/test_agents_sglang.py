"""Multi-turn rollouts against a real SGLang server; transformers is the judge of every sampled token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_tools import Publisher, Weights

from megatron_sglang.agents import AgentRollout, create_rollout, plain_encoder
from megatron_sglang.agents.environment import Environments, Limits, Services, Step
from megatron_sglang.config import RolloutConfig
from megatron_sglang.interfaces import Reward
from megatron_sglang.prompts.source import PromptSource, load_prompts, load_tokenizer
from megatron_sglang.rewards import create_reward
from megatron_sglang.types import Completion, GenerateRequest, Prompt, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]

Rescore = Callable[[Weights, Sequence[GenerateRequest], Sequence[Completion]], list[torch.Tensor]]
DATA = Path(__file__).parents[2] / "examples" / "tiny_fim" / "train.jsonl"
SAMPLING = SamplingParams(max_new_tokens=150, stop_token_ids=(0,))


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    verifier = create_reward("fim_python", all_pure=True)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def make(engine: HttpEngine, tiny_model: Path, reward: Reward) -> Callable[..., AgentRollout]:
    tokenizer = load_tokenizer(tiny_model)

    def rollout(environments: Environments, **changes: Any) -> AgentRollout:
        return AgentRollout(
            engine.client,
            reward,
            environments,
            tokenizer.decode,
            plain_encoder(tokenizer),
            SAMPLING,
            group_size=2,
            seed=3,
            **changes,
        )

    return rollout


@pytest.fixture
def source(tiny_model: Path) -> PromptSource:
    return PromptSource(load_prompts(DATA, load_tokenizer(tiny_model), max_prompt_tokens=72).prompts[:12], 4, seed=1)


def off_by(
    groups: Sequence[RolloutGroup], rescore: Rescore, weights: Weights, wanted: Callable[[int], bool]
) -> tuple[float, int]:
    """Largest difference of logprobs at sampled tokens of the wanted versions, and how many there are."""
    pairs = [(group.prompt, done) for group in groups for done in group.completions_G]
    asked = [GenerateRequest(prompt.token_ids_T, SAMPLING) for prompt, _ in pairs]
    gaps = []
    for scores, (_, done) in zip(rescore(weights, asked, [done for _, done in pairs]), pairs, strict=True):
        mask_T = done.loss_mask_T or (1,) * len(done.token_ids_T)
        versions_T = done.versions_T or (done.weight_version,) * len(done.token_ids_T)
        for score, logprob, m, version in zip(scores.tolist(), done.logprobs_T, mask_T, versions_T, strict=True):
            if m and wanted(version):
                gaps.append(abs(score - logprob))
    return max(gaps), len(gaps)


def test_logprobs_of_all_turns_are_those_of_the_whole_trajectory(
    publish: Publisher, make: Callable[..., AgentRollout], source: PromptSource, weights: Weights, rescore: Rescore
) -> None:
    """A turn that was tokenised anew, or a stale prefix cache, would be off from the second turn on."""
    publish(weights)
    rollout = make(Environments.of({"name": "fim_repair", "max_turns": 2, "max_turn_tokens": 24}))
    place = source.state()
    groups = rollout.batch(source, 0)
    gap, count = off_by(groups, rescore, weights, lambda version: True)
    assert gap <= 1e-4
    assert count > 8 * 4
    assert max(done.turns for group in groups for done in group.completions_G) == 2
    source.restore(place)
    again = rollout.batch(source, 0)
    assert [one.token_ids_T for group in again for one in group.completions_G] == [
        one.token_ids_T for group in groups for one in group.completions_G
    ]


def test_stop_texts_of_a_run(
    publish: Publisher, engine: HttpEngine, reward: Reward, tiny_model: Path, weights: Weights, source: PromptSource
) -> None:
    """`rollout.stop` with a real tokenizer and SGLang: the tokens are those of the run without, up to the one that
    completes the text; the verifier gets what is before it."""
    publish(weights)
    tokenizer = load_tokenizer(tiny_model)
    place = source.state()

    def run(*stop: str) -> list[Completion]:
        source.restore(place)
        config, sampling = RolloutConfig(samples_per_prompt=2, stop=stop), replace(SAMPLING, stop=stop)
        more: Any = {"engine": engine, "reward": reward, "tokenizer": tokenizer, "seed": 3, "say": print}
        groups = create_rollout(config, sampling=replace(sampling, max_new_tokens=24), **more).batch(source, 0)
        return [one for group in groups for one in group.completions_G]

    free = run()
    stop = Counter(one.text[place : place + 2] for one in free for place in range(1, len(one.text) - 1)).most_common(1)
    text = stop[0][0]
    ended = 0
    for whole, stopped in zip(free, run(text, "never said"), strict=True):
        assert stopped.token_ids_T == whole.token_ids_T[: len(stopped.token_ids_T)]
        if text not in whole.text:
            assert (stopped.text, len(stopped.token_ids_T)) == (whole.text, len(whole.token_ids_T))
            continue
        ended += 1
        assert stopped.finish_reason == "stop"
        assert text not in tokenizer.decode(stopped.token_ids_T[:-1])
        assert text in tokenizer.decode(stopped.token_ids_T)
        assert stopped.text == whole.text.partition(text)[0]
    assert ended >= 2


class Patient:
    """One turn for every other prompt, eight for the rest; a reward that differs between members."""

    def __init__(self, services: Services) -> None:
        self.left = 0

    def reset(self, prompt: Prompt) -> str:
        self.left = 8 if int(prompt.id.split("/")[1]) % 2 else 1
        return ""

    async def step(self, turn: Completion) -> Step:
        self.left -= 1
        return Step("# again\n", float(len(turn.token_ids_T)), self.left == 0)

    async def close(self) -> None: ...


def test_a_trajectory_over_two_weight_versions_has_the_logprobs_of_each(
    publish: Publisher,
    engine: HttpEngine,
    make: Callable[..., AgentRollout],
    tiny_model: Path,
    weights: Weights,
    other_weights: Weights,
    rescore: Rescore,
) -> None:
    """Aborted under one version and continued under the next: each token belongs to the weights that sampled it, with
    all earlier tokens, of either version, before it."""
    prompts = load_prompts(DATA, load_tokenizer(tiny_model), max_prompt_tokens=72).prompts[:24]
    ordered = sorted(prompts, key=lambda prompt: int(prompt.id.split("/")[1]) % 2 == 0)
    short, long = ordered[12:], ordered[:12]
    source = PromptSource([*short[:2], *long[:2], *short[2:]], 2, shuffle=False)
    limits = Limits(max_turns=8, max_turn_tokens=12)
    rollout = make(Environments("patient", limits, Patient), over_sampling=2.0, stragglers="resume")
    publish(weights)
    first = engine.version
    rollout.batch(source, 0)
    assert {one.prompt.id for one in rollout.buffer} == {prompt.id for prompt in long[:2]}
    publish(other_weights)
    rollout.over_sampling = 1.0  # await all of them
    mixed = rollout.batch(source, 1)
    assert {group.prompt.id for group in mixed} == {prompt.id for prompt in long[:2]}
    for found, wanted in (
        (weights, lambda version: version == first),
        (other_weights, lambda version: version != first),
    ):
        gap, count = off_by(mixed, rescore, found, wanted)
        assert gap <= 1e-4
        assert count > 0
