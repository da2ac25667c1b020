"""The shipped environments, the calculator, and how a run finds an environment by name."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sglang.agents import tools
from megatron_sglang.agents.environment import Environments, Limits, Services, Step
from megatron_sglang.agents.fim_repair import error_line
from megatron_sglang.agents.tools import Call, ToolError, calculate, find_call
from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.types import Completion, Prompt, Score


def turn(text: str, finish: str = "stop") -> Completion:
    return Completion((5, 0), (-1.0, -1.0), finish, 1, text=text)  # type: ignore[arg-type]


def act(
    asked: dict[str, Any], prompt: Prompt, turns: list[Completion], scores: list[Score] | None = None
) -> list[Step]:
    """What an environment says to turns; its verifier gives `scores` in order."""

    async def run() -> list[Step]:
        left = iter(scores or [])

        async def score(prompt: Prompt, completion: Completion) -> Score:
            return next(left)

        environment = Environments.of(asked).make(Services(score, lambda text: tuple(map(ord, text))))
        environment.reset(prompt)
        steps = [await environment.step(one) for one in turns]
        await environment.close()
        return steps

    return asyncio.run(run())


QUESTION = Prompt("q", (1, 2), "arithmetic", {"ground_truth": "1777"})


def test_a_call_is_answered_and_the_answer_is_scored() -> None:
    call, answer = act({"name": "arithmetic"}, QUESTION, [turn("calc(47*38-9)"), turn(" 1777")])
    assert (call.observation, call.done, call.reward, call.counts) == (
        "1777\n",
        False,
        0.0,
        {"tool_calls": 1, "tool_errors": 0},
    )
    assert (answer.done, answer.reward, answer.passed) == (True, 1.0, True)


@pytest.mark.parametrize(
    ("text", "observation"),
    [
        ("calc(47*38", "error: call is not closed\n"),
        ("calc(47*)", "error: invalid expression\n"),
        ("calc(1/0)", "error: division by zero\n"),
        ("search(cats)", "error: no tool search\n"),
    ],
)
def test_a_bad_call_is_an_observation_and_not_the_end(text: str, observation: str) -> None:
    (step,) = act({"name": "arithmetic"}, QUESTION, [turn(text)])
    assert (step.observation, step.done, step.counts) == (observation, False, {"tool_calls": 1, "tool_errors": 1})


@pytest.mark.parametrize(("text", "finish"), [("1778", "stop"), ("", "stop"), ("nan", "stop"), ("1777", "length")])
def test_a_wrong_or_unfinished_answer_earns_nothing(text: str, finish: str) -> None:
    (step,) = act({"name": "arithmetic"}, QUESTION, [turn(text, finish)])
    assert (step.done, step.reward, step.passed) == (True, 0.0, False)


def test_a_question_without_a_number_is_an_error_of_the_data() -> None:
    with pytest.raises(RewardError, match="problem 'x' has ground_truth='many'; the environment needs a number"):
        act({"name": "arithmetic"}, Prompt("x", (1,), "arithmetic", {"ground_truth": "many"}), [])


def test_calls_in_json_are_those_of_qwen() -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "calc", "arguments": {"expression": "2**10"}}\n</tool_call>'
    (step,) = act({"name": "arithmetic", "calls": "json"}, QUESTION, [turn(text)])
    assert step.observation == "1024\n"
    for broken in (
        "<tool_call>{",
        "<tool_call>{</tool_call>",
        '<tool_call>{"name": "calc"}</tool_call>',
        "<tool_call>[]</tool_call>",
    ):
        with pytest.raises(ToolError):
            find_call(broken, "json")
    assert find_call("1777", "json") is None


@pytest.mark.parametrize(
    ("calls", "text", "stopped_by", "observation"),
    [
        ("json", '<tool_call>{"name": "calc", "arguments": {"e": "2**10"}}', "</tool_call>", "1024\n"),
        ("json", '<tool_call>{"name": "calc", "arguments": {"e": "2**10"}', "}</tool_call>", "1024\n"),
        ("json", '<tool_call>{"name": "calc", "arguments": {"e": "2**10"}}', "</tool", "error: call is not closed\n"),
        ("plain", "calc(47*38-9", ")", "1777\n"),
        ("plain", "calc(47*38-9)", "</turn>", "1777\n"),
        ("plain", "calc(47*38-9", "\n", "error: call is not closed\n"),
    ],
)
def test_a_stop_text_that_closes_a_call_belongs_to_it(calls: str, text: str, stopped_by: str, observation: str) -> None:
    """`rollout.stop: </tool_call>` ends each turn where Qwen ends its call, and the turn's text ends before it."""
    ended = replace(turn(text), stopped_by=stopped_by)
    (step,) = act({"name": "arithmetic", "calls": calls}, QUESTION, [ended])
    assert (step.observation, step.done) == (observation, False)


@pytest.mark.parametrize(("calls", "stopped_by"), [("plain", ")"), ("json", "</tool_call>"), ("json", "<tool_call>")])
def test_an_answer_is_what_stands_before_the_stop_text(calls: str, stopped_by: str) -> None:
    (step,) = act({"name": "arithmetic", "calls": calls}, QUESTION, [replace(turn("1777"), stopped_by=stopped_by)])
    assert (step.done, step.reward) == (True, 1.0)


@pytest.mark.parametrize(
    ("text", "call"),
    [("calc(1+2)", Call("calc", "1+2")), (" f((1)) \n", Call("f", "(1)")), ("12", None), ("so calc(1)", None)],
)
def test_a_plain_call_is_the_whole_turn(text: str, call: Call | None) -> None:
    assert find_call(text) == call


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from(["+", "-", "*", "//", "%"]))
def test_the_calculator_agrees_with_python(a: int, b: int, op: str) -> None:
    text = f"({a}){op}({b})"
    if b == 0 and op in ("//", "%"):
        with pytest.raises(ToolError, match="division by zero"):
            calculate(text)
    else:
        assert calculate(text) == str(eval(text))  # numbers of this test


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('id')",
        "9**9**9",
        "10**15*10",
        "(1).__class__",
        "[1]*10",
        "'a'*9",
        "lambda: 1",
        "1 if 1 else 2",
        "a:=1",
        "1_000",
        "0x10",
        "2**0.5",
        "2**-1",
        "1e999",
        "(" * 150,
        "1+" * 150 + "1",
        "",
        "\0",
        "²",
        "1,2",
        "1;2",
        "~1",
        "1<<9",
    ],
)
def test_the_calculator_refuses_what_is_not_small_arithmetic(text: str) -> None:
    with pytest.raises(ToolError):
        calculate(text)


@given(st.text("0123456789+-*/%(). eE", max_size=30) | st.text(max_size=30))
def test_whatever_is_written_gives_a_number_or_a_tool_error(text: str) -> None:
    with contextlib.suppress(ToolError):
        float(calculate(text))


def test_numbers_with_a_fraction_are_short() -> None:
    assert [calculate(text) for text in ("7/2", "1/3", "2**10", "-3--4", "1e3*2", "6/3")] == [
        "3.5", "0.3333333333", "1024", "1", "2000", "2",
    ]  # fmt: skip
    assert tools.MAX_MAGNITUDE == 10**15


PROBLEM = Prompt("p", (7, 8, 9), "fim_python", {})


def test_repair_shows_the_error_and_the_prompt_again_until_the_tests_pass() -> None:
    scores = [Score(0.25, False, "wrong value -1,\nexpected 5"), Score(1.0, True)]
    first, second = act({"name": "fim_repair", "discount": 0.9}, PROBLEM, [turn("a - b"), turn("a + b")], scores)
    assert first.observation == (*map(ord, "# wrong value -1, expected 5\n"), 7, 8, 9)
    assert (first.reward, first.done, first.counts) == (0.25, False, {"first_attempt_passed": 0.0})
    assert (second.reward, second.done, second.passed) == (0.9, True, True)
    assert second.counts == {"first_attempt_passed": 0.0}
    (step,) = act({"name": "fim_repair", "restate": False}, PROBLEM, [turn("x")], [Score(0.0, False, "timeout")])
    assert step.observation == tuple(map(ord, "# timeout\n"))


def test_the_error_is_one_bounded_line_that_is_the_same_each_time() -> None:
    assert error_line("ValueError: <f at 0x7f3a>\n  in\tf", 80) == "ValueError: <f at 0x> in f"
    assert error_line("x" * 300, 40) == "x" * 40
    assert error_line("", 40) == "failed"


class Mine:
    """An environment of a user."""

    def __init__(self, services: Services, *, folder: str, depth: int = 2) -> None:
        self.folder, self.depth = folder, depth

    def reset(self, prompt: Prompt) -> str:
        return ""

    async def step(self, turn: Completion) -> Step:
        return Step(done=True)

    async def close(self) -> None: ...


HERE = f"{__name__}:Mine"


def test_environments_are_found_by_name_with_limits_and_arguments_of_their_own() -> None:
    none = Environments.of({})
    assert (none.name, none.limits.max_turns) == ("single", 1)
    repair = Environments.of({"name": "fim_repair", "max_turn_tokens": 24, "restate": False})
    assert (repair.limits.max_turns, repair.limits.max_turn_tokens) == (3, 24)
    mine = Environments.of({"name": HERE, "folder": "x", "max_turns": 5})
    made: Any = mine.make(None)  # type: ignore[arg-type]
    assert (made.folder, made.depth, mine.limits) == ("x", 2, Limits(max_turns=5))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_turns": 2}, "has no name; expected single, fim_repair, arithmetic or package.module:Class"),
        ({"name": "fim_repare"}, r"'fim_repare' is unknown; did you mean fim_repair\?"),
        ({"name": "arithmetic", "max_turn": 2}, r"max_turn is not an argument of arithmetic; did you mean max_turns"),
        ({"name": "fim_repair", "discont": 1}, r"discont is not an argument of fim_repair; did you mean discount\?"),
        ({"name": HERE}, f"rollout.environment of {HERE} lacks folder"),
        ({"name": f"{__name__}:Nobody"}, "cannot be imported: .*Nobody"),
        ({"name": "no_such_module:X"}, "cannot be imported: No module named"),
        ({"name": "arithmetic", "max_turns": 0}, "max_turns=0; expected a whole number, 1 or above"),
        ({"name": "arithmetic", "max_turns": "2"}, "max_turns='2'; expected a whole number"),
        ({"name": "arithmetic", "step_timeout_s": 0}, "step_timeout_s=0; expected above 0"),
    ],
)
def test_what_an_environment_does_not_have_is_an_error_with_a_suggestion(asked: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environments.of(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "arithmetic", "calls": "xml"}, "calls='xml'; expected plain or json"),
        ({"name": "fim_repair", "discount": 0}, "discount=0; expected above 0, at most 1"),
        ({"name": "fim_repair", "max_error_characters": 0}, "max_error_characters=0; expected at least 1"),
    ],
)
def test_values_that_cannot_work_are_errors(asked: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environments.of(asked).make(None)  # type: ignore[arg-type]
