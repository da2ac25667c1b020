"""Routed experts from the engine's answer to the trainer's tensors: no number lost, none at another token's place."""

from __future__ import annotations

import base64
import dataclasses
import json
import random

import pytest
import torch
from scripted_engine import ScriptedEngine, limited, make_rollout, source

from megatron_sglang import routing
from megatron_sglang.batching import collate, expert_numbers
from megatron_sglang.engine import EngineOptions, answers
from megatron_sglang.engine.fake_model import routed_experts
from megatron_sglang.engine.options import server_args
from megatron_sglang.errors import ConfigError, EngineError
from megatron_sglang.rollout import to_samples
from megatron_sglang.types import GenerateRequest, RoutedExperts, SamplingParams, TrainSample

MODEL = "examples/tiny_fim/model"
NUMBERS = 4 * 2  # layers x top_k


def told(numbers_TN: torch.Tensor) -> str:
    return base64.b64encode(numbers_TN.to(torch.int32).numpy().tobytes()).decode()


def numbers(tokens: int, experts: int) -> torch.Tensor:
    return torch.randint(0, experts, (tokens, NUMBERS), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("experts", "width"), [(8, 1), (256, 1), (512, 2), (32768, 2)])
def test_numbers_come_back(experts: int, width: int) -> None:
    """A byte lost in narrowing would send tokens to experts that exist, and nothing would complain."""
    expected = numbers(50, experts)
    expected[7, 3] = experts - 1
    routed = routing.of_engine(told(expected), 50)
    assert (routed.tokens, routed.width) == (50, width)
    assert torch.equal(expert_numbers(routed).int(), expected.int())


def test_parts_join_whatever_their_width() -> None:
    """Turns and resumed rollouts are parts, and only some of them need two bytes a number."""
    parts = [numbers(5, 8), numbers(3, 300), numbers(1, 8)]
    whole = routing.joined([None, *(routing.of_engine(told(part), len(part)) for part in parts), None])
    assert whole is not None
    assert torch.equal(expert_numbers(whole).int(), torch.cat(parts).int())
    assert routing.joined([None, None]) is None


@pytest.mark.parametrize(
    ("text", "tokens", "reason"),
    [
        ("%%%", 1, "not base64"),
        (told(numbers(5, 8)), 3, "for 3 tokens"),
        (told(numbers(5, 8)), 0, "for 0 tokens"),
        (told(numbers(5, 8) - 1), 5, "outside 0 .. 65535"),
        (told(numbers(5, 8) + 65536), 5, "outside 0 .. 65535"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, tokens: int, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        routing.of_engine(text, tokens)


def sample(prompt: int, response: int) -> TrainSample:
    count = prompt + response - 1
    routed = routing.of_engine(told(numbers(count, 8)), count)
    ids = tuple(range(1, prompt + response + 1))
    return TrainSample(ids[:prompt], ids[prompt:], (-1.0,) * response, 0.5, 1.0, 3, routed_experts=routed)


def test_each_token_of_a_batch_has_its_own_experts() -> None:
    """Off by one, or into the padding, and every layer works on the wrong experts."""
    batch = collate([sample(3, 2), sample(5, 6)], multiple_of=8)
    assert batch.routed_experts is not None
    assert batch.routed_experts.shape == (2, 16, NUMBERS)
    for row, length in enumerate((5, 11)):
        assert torch.equal(batch.routed_experts[row, : length - 1].int(), numbers(length - 1, 8).int())
        assert (batch.routed_experts[row, length - 1 :] == -1).all()
    assert collate([dataclasses.replace(sample(3, 2), routed_experts=None)]).routed_experts is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_experts_go_with_their_tokens_to_each_context_rank(packed: bool, size: int) -> None:
    """Those of another token would be replayed without an error."""
    samples, first = [], 1
    for length in (5, 11, 8):
        ids = tuple(range(first, first + length))
        told_TN = torch.tensor(ids[:-1])[:, None].expand(-1, NUMBERS)
        routed = routing.of_engine(told(told_TN), length - 1)
        samples.append(TrainSample(ids[:2], ids[2:], (-1.0,) * (length - 2), 0.5, 1.0, 3, routed_experts=routed))
        first += length
    untold = {sample.response_ids_T[-1] for sample in samples}
    seen = []
    for rank in range(size):
        mine = collate(samples, 2 * size, packed=packed).of_context_rank(rank, size)
        assert mine.routed_experts is not None
        tokens, experts = mine.lay(mine.tokens), mine.lay(mine.routed_experts)
        assert tokens.shape == experts.shape[:2]
        for token, row in zip(tokens.flatten().tolist(), experts.flatten(0, 1).tolist(), strict=True):
            assert set(row) == {-1 if token in {0, *untold} else token}
            seen.append(token)
    assert sorted(token for token in seen if token) == list(range(1, first))


def test_experts_of_some_samples_only_are_an_error() -> None:
    with pytest.raises(EngineError, match="1 of 2 samples"):
        collate([sample(3, 2), dataclasses.replace(sample(3, 3), routed_experts=None)])
    with pytest.raises(ValueError, match="5 tokens but the routed experts of 10"):
        dataclasses.replace(sample(3, 2), routed_experts=sample(5, 6).routed_experts)


@pytest.mark.parametrize(
    ("counts", "dtype"), [((128, 8), torch.int8), ((129, 8), torch.int16), ((300, 8), torch.int16)]
)
def test_a_batch_has_as_few_bytes_as_its_numbers_need(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """One byte that wraps to a negative number would be taken for "not told"."""
    parts = []
    for count in counts:
        told_TN = numbers(4, count)
        told_TN[2, 5] = count - 1
        routed = routing.of_engine(told(told_TN), 4)
        parts.append((told_TN, dataclasses.replace(sample(3, 2), routed_experts=routed)))
    batch = collate([part for _, part in parts], multiple_of=8).routed_experts
    assert batch is not None
    assert batch.dtype == dtype
    for row, (told_TN, _) in enumerate(parts):
        assert torch.equal(batch[row, :4].int(), told_TN.int())
        assert (batch[row, 4:] == -1).all()


def test_checkpoints_hold_experts_as_json() -> None:
    """Rollouts under way are saved with them."""
    routed = sample(4, 3).routed_experts
    assert routed is not None
    row = dataclasses.asdict(routed, dict_factory=routing.json_values)
    assert routing.from_json(json.loads(json.dumps(row))) == routed
    assert routing.from_json(None) is None


def test_what_is_asked_of_sglang() -> None:
    """A batch has one switch; requests that differ would get each other's tokens."""
    one = GenerateRequest((1, 2), SamplingParams(seed=1))
    asked = dataclasses.replace(one, routing_from=0)
    assert "return_routed_experts" not in answers.batch_body([one]) | answers.body_of(one, "r")
    body = answers.batch_body([asked, one])
    assert (body["return_routed_experts"], body["routed_experts_start_len"]) == (True, 0)
    assert answers.body_of(dataclasses.replace(one, routing_from=1), "r")["routed_experts_start_len"] == 1
    with pytest.raises(ConfigError, match=r"from \[0, 1\] on"):
        answers.batch_body([asked, dataclasses.replace(one, routing_from=1)])


def test_an_engine_that_tells_nothing_is_an_error() -> None:
    """Replay would silently be none."""
    meta = {"finish_reason": {"type": "length"}, "completion_tokens": 1, "prompt_tokens": 2, "weight_version": "1"}
    reply = {"output_ids": [5], "meta_info": meta | {"output_token_logprobs": [[-1.0, 5, None]]}}
    assert answers.read(reply).routed_experts is None
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        answers.read(reply, 0, 0)
    reply["meta_info"]["routed_experts"] = routed_experts(MODEL, [1, 2, 5], 1)
    found = answers.read(reply, 0, 1).routed_experts
    assert found is not None
    assert found.tokens == 1


def test_options_that_would_lose_experts_are_refused() -> None:
    options = EngineOptions(MODEL, device="cpu", routed_experts=True)
    given = server_args(options, 1)
    assert given["enable_return_routed_experts"]
    assert given["chunked_prefill_size"] > 0
    assert not server_args(EngineOptions(MODEL, device="cpu"), 1)["enable_return_routed_experts"]
    for extra in (
        {"chunked_prefill_size": -1},
        {"enable_hierarchical_cache": True},
        {"speculative_algorithm": "EAGLE"},
    ):
        with pytest.raises(ConfigError, match="with routed experts"):
            server_args(dataclasses.replace(options, extra=extra), 1)


def whole(ids: tuple[int, ...]) -> RoutedExperts:
    return routing.of_engine(routed_experts(MODEL, ids, 0), len(ids) - 1)


@pytest.mark.parametrize("resume", [False, True])
def test_trajectories_gather_experts_over_turns_and_aborts(resume: bool) -> None:
    """Each request tells only what is new. In the scripted engine experts follow from token and place, so a part
    that is missing, repeated or shifted shows in the whole."""
    engine = ScriptedEngine()
    engine.experts_of = MODEL
    rollout = make_rollout(engine, routing=True)
    if resume:
        rollout.over_sampling, rollout.stragglers = 1.5, "resume"
        slow = random.Random(2)
        engine.slow = lambda request: 1 + 20 * (slow.random() < 0.2)
    rollout = limited(rollout, 40)
    prompts = source()
    groups = rollout.batch(prompts, 0)
    if resume:
        assert any(one.routed for group in rollout.buffer for one in group.trajectories)
        rollout.restore(json.loads(json.dumps(rollout.state())))
        groups += rollout.batch(prompts, 1)
    completions = [(group.prompt, completion) for group in groups for completion in group.completions_G]
    assert any(completion.turns > 1 for _, completion in completions)
    for prompt, completion in completions:
        assert completion.routed_experts == whole(prompt.token_ids_T + completion.token_ids_T)
    samples = to_samples(groups, torch.zeros(len(groups), 3))
    assert all(one.routed_experts for one in samples)


@pytest.mark.parametrize("later", [False, True])
def test_replay_may_be_switched_at_a_resume(later: bool) -> None:
    """What stands then has experts of some tokens where none are wanted any more, or none where all are."""
    engine = ScriptedEngine()
    engine.experts_of = MODEL
    slow = random.Random(2)
    engine.slow = lambda request: 1 + 20 * (slow.random() < 0.2)
    before, prompts = make_rollout(engine, routing=not later, over_sampling=1.5, stragglers="resume"), source()
    before.batch(prompts, 0)
    stands = [one for group in before.buffer for one in group.trajectories]
    assert {one.finish_reason is None for one in stands} == {True, False}
    after = make_rollout(engine, routing=later)
    after.restore(json.loads(json.dumps(before.state())))
    groups = after.batch(prompts, 1)
    assert [group.prompt.id for group in groups[:2]] == [group.prompt.id for group in before.buffer]
    for group in groups:
        for one in group.completions_G:
            assert one.routed_experts == (whole(group.prompt.token_ids_T + one.token_ids_T) if later else None)
    to_samples(groups, torch.zeros(len(groups), 3))


def test_evaluation_asks_for_no_experts() -> None:
    """They are megabytes, and nobody trains on them."""
    engine = ScriptedEngine()
    engine.experts_of = MODEL
    make_rollout(engine, routing=True).evaluate(source().draw(3))
    assert all(request.routing_from is None for request, _ in engine.asked)
