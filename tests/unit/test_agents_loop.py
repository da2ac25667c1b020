"""Trajectories against a scripted engine: every token is where it belongs, with what belongs to it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import STOP, ScriptedEngine, Talk, limited, make_rollout, prompts, source

from megatron_sglang.agents.arithmetic import Arithmetic
from megatron_sglang.agents.environment import Limits, Step
from megatron_sglang.errors import ConfigError, EngineError, EngineStaleError, RewardError
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.rollout import request_seed
from megatron_sglang.types import Completion, GenerateRequest, Prompt, RolloutGroup

LIMITS = st.builds(
    Limits,
    max_turns=st.integers(1, 5),
    max_turn_tokens=st.integers(0, 9),
    max_observation_tokens=st.integers(1, 7),
)


def check(engine: ScriptedEngine, groups: tuple[RolloutGroup, ...], tokens: int, limits: Limits) -> None:
    """What must hold of any batch, whatever was aborted on the way."""
    sessions: dict[tuple[int, int, int], list[tuple[GenerateRequest, Completion]]] = {}
    for request, one in engine.asked:
        assert request.sampling.seed is not None
        sessions.setdefault(owners()[request.sampling.seed], []).append((request, one))
    for group in groups:
        start = len(group.prompt.token_ids_T)
        for done in group.completions_G:
            whole = group.prompt.token_ids_T + done.token_ids_T
            mask_T = done.loss_mask_T or (1,) * len(done.token_ids_T)
            versions_T = done.versions_T or (done.weight_version,) * len(done.token_ids_T)
            rows = list(zip(done.token_ids_T, done.logprobs_T, versions_T, strict=True))
            found = {place: row for place, (row, m) in enumerate(zip(rows, mask_T, strict=True)) if m}
            assert any(sampled(session, whole, start) == found for session in sessions.values())
            assert all(row[1] == 0.0 for row, m in zip(rows, mask_T, strict=True) if not m)
            assert 1 <= len(done.token_ids_T) <= tokens
            assert 1 <= done.turns <= limits.max_turns
            assert done.finish_reason in ("stop", "length")
            added = [i for i, m in enumerate(mask_T) if not m and done.token_ids_T[i] == STOP]
            assert all(done.token_ids_T[i - 1] != STOP for i in added), "an end token after an end token"


@functools.cache
def owners() -> dict[int, tuple[int, int, int]]:
    """Seed of a request -> prompt, batch and member of its trajectory."""
    found = {}
    for prompt, step, member in itertools.product(range(60), range(4), range(3)):
        for place in (f"{step}", *(f"{step}/{turn}/{part}" for turn in range(6) for part in range(6))):
            found[request_seed(1, place, f"p{prompt}", member)] = (prompt, step, member)
    return found


def sampled(
    session: list[tuple[GenerateRequest, Completion]], whole: tuple[int, ...], start: int
) -> dict[int, tuple[int, float, int]] | None:
    """Place in the trajectory -> token, logprob, version, as the engine gave them; None for another trajectory's."""
    found = {}
    for request, one in session:
        before = len(request.token_ids_T)
        if (request.token_ids_T + one.token_ids_T) != whole[: before + len(one.token_ids_T)]:
            return None
        for place, (token, logprob) in enumerate(zip(one.token_ids_T, one.logprobs_T, strict=True), before - start):
            assert place not in found, "sampled twice"
            found[place] = (token, logprob, one.weight_version)
    return found


@settings(max_examples=25)
@given(limits=LIMITS, tokens=st.integers(8, 40), ends=st.integers(1, 9), first=st.integers(0, 3))
def test_every_token_has_its_own_mask_logprob_and_version(limits: Limits, tokens: int, ends: int, first: int) -> None:
    """One place off, and the loss trains observations, or compares a token with another's logprob."""
    engine = ScriptedEngine()
    rollout = limited(make_rollout(engine, limits=limits, arguments={"ends": ends, "first": first}), tokens)
    check(engine, rollout.batch(source(), 0), tokens, limits)


@settings(max_examples=25)
@given(
    limits=LIMITS,
    tokens=st.integers(8, 40),
    ends=st.integers(1, 9),
    slow=st.floats(1, 20),
    over=st.sampled_from([1.0, 1.25, 1.5, 2.0]),
)
def test_trajectories_taken_up_under_later_weights_stay_whole(
    limits: Limits, tokens: int, ends: int, slow: float, over: float
) -> None:
    """Aborted anywhere, kept as JSON, continued in later batches: nothing is lost, repeated or relabelled."""
    engine = ScriptedEngine()
    engine.slow = lambda request: slow if request.token_ids_T[0] % 3 == 0 else 1.0
    rollout = make_rollout(engine, limits=limits, arguments={"ends": ends}, over_sampling=over, stragglers="resume")
    limited(rollout, tokens)
    prompts_left = source(60)
    started: list[str] = []
    for step in range(4):
        groups = rollout.batch(prompts_left, step)
        assert len(groups) == 4
        check(engine, groups, tokens, limits)
        started += [group.prompt.id for group in groups]
        rollout.restore(json.loads(json.dumps(rollout.state())))
        engine.version += 1
    assert len(started) == len(set(started)), "a group was trained twice"


def test_a_batch_is_the_same_for_any_pace_and_order() -> None:
    paces = (
        lambda request: 1.0,
        lambda request: 1.0 + request.token_ids_T[0] % 7,
        lambda request: 9.0 / len(str(request)),
    )
    found = []
    for pace in paces:
        engine = ScriptedEngine()
        engine.slow = pace
        found.append(make_rollout(engine, dynamic_sampling=True).batch(source(), 3))
    assert found[0] == found[1] == found[2]


def test_a_group_is_a_session_and_its_trajectories_keep_apart() -> None:
    """Sessions decide which engine and which prefix cache serve a turn: the prompt is the group's, seeds are not."""
    engine = ScriptedEngine()
    make_rollout(engine).batch(source(), 0)
    by_session: dict[str, list[tuple[int, ...]]] = {}
    for request, _ in engine.asked:
        by_session.setdefault(request.session_id, []).append(request.token_ids_T)
    assert len(by_session) == 4
    for histories in by_session.values():
        assert len({one[:2] for one in histories}) == 1, "one prompt"
        assert histories.count(min(histories, key=len)) == 3, "the first turns of three trajectories"
    seeds = [request.sampling.seed for request, _ in engine.asked]
    assert len(set(seeds)) == len(seeds)


class Once(Talk):
    """One observation of a given length, then the end."""

    async def step(self, turn: Completion) -> Step:
        self.seen = getattr(self, "seen", 0) + 1
        return Step((11,) * self.first, float(self.seen), self.seen == 2, False)

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize(
    ("room", "turns", "finish"),
    [(5, 1, "length"), (8, 1, "length"), (9, 2, "length"), (40, 2, "stop")],
)
def test_what_does_not_fit_ends_the_trajectory_and_says_so(room: int, turns: int, finish: str) -> None:
    """Turn 1 is five tokens and a stop, the observation two: nine is the first limit that leaves room for turn 2."""
    engine = ScriptedEngine()
    engine.whole = lambda request: _fixed(engine, request.sampling.max_new_tokens)  # type: ignore[method-assign]
    rollout = limited(make_rollout(engine, kind=Once, arguments={"first": 2}), room)
    ((done, *_),) = (group.completions_G for group in rollout.batch(source(4, 1), 0))
    assert (done.turns, done.finish_reason) == (turns, finish)
    assert len(done.token_ids_T) == {5: 5, 8: 6, 9: 9, 40: 14}[room]


def _fixed(engine: ScriptedEngine, room: int) -> Completion:
    ids = (1, 2, 3, 4, 5, STOP)[:room]
    return Completion(ids, (-1.0,) * len(ids), "stop" if len(ids) == 6 else "length", engine.version)


def test_an_end_token_that_we_add_is_masked_and_one_that_was_sampled_is_not() -> None:
    engine = ScriptedEngine()
    engine.whole = lambda request: _fixed(engine, request.sampling.max_new_tokens)  # type: ignore[method-assign]
    cut = Limits(max_turns=2, max_turn_tokens=3)
    groups = make_rollout(engine, kind=Once, arguments={"first": 1}, limits=cut).batch(source(4, 1), 0)
    done = groups[0].completions_G[0]
    assert done.token_ids_T == (1, 2, 3, STOP, 11, 1, 2, 3)
    assert done.loss_mask_T == (1, 1, 1, 0, 0, 1, 1, 1)
    groups = make_rollout(engine, kind=Once, arguments={"first": 1}).batch(source(4, 1), 0)
    done = groups[0].completions_G[0]
    assert done.token_ids_T == (1, 2, 3, 4, 5, STOP, 11, 1, 2, 3, 4, 5, STOP)
    assert done.loss_mask_T == (1,) * 6 + (0,) + (1,) * 6


def test_a_call_that_a_stop_text_ends_is_found() -> None:
    """`calls: json` with `</tool_call>` as stop text: what the engine stopped at is cut from the turn's text, and the
    turn must be a call all the same. Its last token closes the text and says something more."""
    engine = ScriptedEngine()
    call = '<tool_call>{"name": "calc", "arguments": {"e": "6*7"}}</tool_call'
    closing = 300

    def spell(ids: Sequence[int]) -> str:
        return "".join({closing: ">\n"}.get(one, chr(one)) for one in ids)

    def whole(request: GenerateRequest) -> Completion:
        answered = spell(request.token_ids_T).endswith(f"{STOP:c}42\n")
        ids = (*map(ord, "42"), STOP) if answered else (*map(ord, call), closing)
        return Completion(ids, (-1.0,) * len(ids), "stop", engine.version)

    engine.whole = whole  # type: ignore[method-assign]
    limits = Limits(max_turns=3, max_observation_tokens=9)
    rollout = make_rollout(engine, kind=Arithmetic, arguments={"calls": "json"}, limits=limits, decode=spell)
    rollout.sampling = replace(rollout.sampling, max_new_tokens=120, stop=("\n\n", "</tool_call>"))
    asked = PromptSource([Prompt("q", (1,), "arithmetic", {"ground_truth": "42"})], 1, shuffle=False)
    groups = rollout.batch(asked, 0)
    done = groups[0].completions_G[0]
    assert (done.turns, done.finish_reason, done.text) == (2, "stop", f"{call}>\n{STOP:c}42\n42")
    assert done.loss_mask_T == (1,) * (len(call) + 1) + (0,) * 4 + (1,) * 3
    assert rollout.metrics(groups)["rollout/tool_errors"].value() == 0.0
    rollout.environments = replace(rollout.environments, limits=Limits(max_turns=1))
    cut = rollout.batch(asked, 1)[0].completions_G[0]
    assert (cut.text, cut.stopped_by) == (call.removesuffix("</tool_call"), "</tool_call>")


def test_a_long_observation_is_cut_and_counted() -> None:
    engine = ScriptedEngine()
    limits = Limits(max_turns=2, max_observation_tokens=3)
    rollout = make_rollout(engine, kind=Once, arguments={"first": 9}, limits=limits)
    groups = rollout.batch(source(4, 1), 0)
    assert all(one.token_ids_T.count(11) <= 3 for one in groups[0].completions_G)
    assert rollout.metrics(groups)["rollout/cut_observations"].value() == 1.0


class Silent(Talk):
    async def step(self, turn: Completion) -> Step:
        await asyncio.sleep(1e6)
        raise AssertionError


class Endless(Talk):
    async def close(self) -> None:
        await asyncio.sleep(1e6)


class Boundless(Talk):
    async def step(self, turn: Completion) -> Step:
        return Step(reward=float("inf"))


class Broken(Talk):
    async def step(self, turn: Completion) -> Step:
        raise KeyError("label")


class Offline(Talk):
    """Its own deadline is another than the loop's."""

    async def step(self, turn: Completion) -> Step:
        raise TimeoutError("the database did not answer")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Silent, RewardError, "Silent did not answer a turn of prompt 'p.' within 600 s"),
        (Endless, RewardError, "Endless did not close after prompt 'p.' within 600 s"),
        (Boundless, RewardError, "the reward inf; expected a finite number"),
        (Broken, KeyError, "label"),
        (Offline, TimeoutError, "the database did not answer"),
    ],
)
def test_an_environment_that_fails_ends_the_batch_by_name(kind: type, error: type[Exception], message: str) -> None:
    engine = ScriptedEngine()
    with pytest.raises(error, match=message) as caught:
        make_rollout(engine, kind=kind).batch(source(), 0)
    assert kind is Endless or "in a trajectory of prompt 'p" in caught.value.__notes__[0]
    assert engine.aborts == 1


@pytest.mark.parametrize(
    ("spoiled", "error", "message"),
    [
        ({"finish_reason": "abort"}, EngineError, "ended by 'abort' after"),
        ({"token_ids_T": (), "logprobs_T": ()}, EngineError, "after 0 tokens; expected 1 to 8"),
        ({"token_ids_T": (1,) * 9, "logprobs_T": (-1.0,) * 9}, EngineError, "after 9 tokens; expected 1 to 8"),
        ({"weight_version": 7}, EngineStaleError, r"weight versions \[1, 7\]"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_an_error(
    spoiled: dict, error: type[Exception], message: str
) -> None:
    engine = ScriptedEngine()
    engine.spoil = lambda one: replace(one, **spoiled) if len(engine.asked) == 2 else one
    rollout = make_rollout(engine)
    with pytest.raises(error, match=message):
        rollout.batch(source(), 0)
    assert rollout.buffer == []


def test_a_first_observation_without_room_is_a_configuration_error() -> None:
    rollout = limited(make_rollout(ScriptedEngine(), arguments={"first": 6}), 6)
    with pytest.raises(ConfigError, match=r"prompt 'p0' has 6 tokens; rollout\.max_new_tokens=6"):
        rollout.evaluate(prompts(1))


def test_limits_that_were_lowered_while_trajectories_stand_are_a_configuration_error() -> None:
    engine = ScriptedEngine()
    engine.slow = lambda request: 3.0 if request.token_ids_T[0] == 100 else 1.0
    rollout = make_rollout(engine, over_sampling=1.25, stragglers="resume")
    rollout.batch(source(), 0)
    assert max(len(one.ids) for group in rollout.buffer for one in group.trajectories) > 1
    with pytest.raises(ConfigError, match=r"rollout\.max_new_tokens=1 .* leave no room, set them as they were"):
        limited(rollout, 1).batch(source(), 1)
