"""Trajectories to rows: which tokens are trained on, how turns are joined, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai.types import CompletionChoice
from openai.types.chat.chat_completion import Choice

from megatron_sglang.art import Trajectory, TrajectoryGroup
from megatron_sglang.art.convert import rows
from megatron_sglang.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}


def said(prompt: list[int], ids: list[int], **other: Any) -> CompletionChoice:
    """A choice as the endpoint gives it for /v1/completions."""
    fields = {
        "finish_reason": "stop",
        "index": 0,
        "text": "four",
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "token_ids": ids,
        "prompt_token_ids": prompt,
        "weight_versions": [3] * len(ids),
    }
    return CompletionChoice.model_validate(fields | other)


def one_row(*items: Any, reward: float = 0.5, **other: Any) -> dict[str, Any]:
    [[row]] = rows([TrajectoryGroup([Trajectory(list(items), reward, **other)])])
    return row


def test_only_what_the_model_said_is_trained_on() -> None:
    row = one_row(USER, said([1, 2, 3], [7, 8]), {"role": "tool", "content": "ok"})
    assert row["ids"] == [1, 2, 3, 7, 8]
    assert row["mask"] == [0, 0, 0, 1, 1]
    assert row["logprobs"] == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert (row["version"], row["reward"], row["passed"], row["finish_reason"]) == (3, 0.5, False, "stop")


def test_chat_choices_serve_as_well() -> None:
    """Their logprobs are at another place."""
    choice = Choice.model_validate(
        {
            "finish_reason": "tool_calls",
            "index": 0,
            "message": {"role": "assistant", "content": None},
            "logprobs": {"content": [{"token": "x", "logprob": -1.5, "top_logprobs": []}]},
            "token_ids": [9],
            "prompt_token_ids": [1],
            "weight_versions": [1],
        }
    )
    row = one_row(USER, choice)
    assert (row["ids"], row["logprobs"], row["text"], row["finish_reason"]) == ([1, 9], [0.0, -1.5], "", "stop")


def test_turns_are_joined_and_observations_masked() -> None:
    """The second prompt is the first turn continued: template, tool's answer, template."""
    row = one_row(USER, said([1, 2], [7, 8]), {"role": "tool", "content": "5"}, said([1, 2, 7, 8, 4, 5], [9]))
    assert row["ids"] == [1, 2, 7, 8, 4, 5, 9]
    assert row["mask"] == [0, 0, 1, 1, 0, 0, 1]
    assert row["turns"] == 2


def test_objects_of_other_packages_and_plain_dictionaries_serve() -> None:
    """ART's own classes, and choices that were stored as JSON."""
    choice = said([1], [2]).model_dump()
    group = SimpleNamespace(trajectories=[SimpleNamespace(messages_and_choices=[USER, choice], reward=1, metrics={})])
    [[row]] = rows([group])
    assert (row["reward"], row["passed"]) == (1.0, True)
    assert one_row(USER, choice, reward=1.0, metrics={"passed": False})["passed"] is False


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([USER, {"role": "assistant", "content": "four"}], "no choice"),
        ([said([1], [2], token_ids=None)], "has no token_ids"),
        ([said([1], [2], prompt_token_ids=None)], "has no prompt_token_ids"),
        ([said([1], [2], logprobs=None)], "1 token_ids and 0 logprobs"),
        ([said([1], [2, 3], weight_versions=[1, 2])], "versions"),
        ([said([1], [2], weight_versions=None)], "versions"),
        ([said([1], [2], finish_reason="content_filter")], "content_filter"),
        ([said([1, 2], [7, 8]), said([1, 2, 7, 9, 4], [5])], "token 3 of 4 differs"),
        ([said([1, 2], [7, 8]), said([1, 2, 7], [5])], "token 3 of 4 differs"),
        ([said([1], [2]), said([1, 2], [3], weight_versions=[4])], "turn 1 was sampled with weight version 4"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_its_place(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=f"group 0, trajectory 0.*{message}"):
        one_row(*items)


def test_failed_trajectories_and_further_histories_are_refused() -> None:
    """ART collects exceptions in groups; a silently smaller group would have other advantages."""
    with pytest.raises(DataError, match="group 0, trajectory 1 is an error"):
        rows([[Trajectory([said([1], [2])]), ValueError("boom")]])
    with pytest.raises(DataError, match="additional_histories"):
        rows([[SimpleNamespace(messages_and_choices=[said([1], [2])], reward=0, additional_histories=[1])]])


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None])
def test_a_reward_that_is_no_number_is_named(reward: Any) -> None:
    """Later it would be an error of a JSON library, without its place."""
    good = [USER, said([1, 2], [3])]
    row = Trajectory(good, reward=reward)
    with pytest.raises(DataError, match=r"group 0, trajectory 1 has reward (nan|inf|None); expected a finite number"):
        rows([TrajectoryGroup([Trajectory(good, reward=1.0), row])])


def test_a_reward_of_another_packages_numbers_is_one() -> None:
    assert one_row(USER, said([1, 2], [3]), reward=torch.tensor(0.25))["reward"] == 0.25  # type: ignore[arg-type]
