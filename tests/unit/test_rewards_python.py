"""Scores of Python holes, on HumanEval and small problems; the door `create_reward`."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_sglang.errors import ConfigError, RewardError, SandboxError
from megatron_sglang.prompts.humaneval import problems
from megatron_sglang.rewards import create_reward
from megatron_sglang.rewards.python_fim import PythonFim
from megatron_sglang.rewards.sandbox import Limits, Sandbox, Verdict
from megatron_sglang.types import Completion, Prompt

TESTS = [{"args": [a], "expect": a + 1} for a in range(4)]
ADD = {"prefix": "def f(a):\n    return ", "suffix": "\n", "entry_point": "f", "tests": TESTS, "pure": True}


def prompt(name="p", **fields):
    return Prompt(name, (1,), "fim_python", ADD | fields)


def answer(text, finish_reason="stop"):
    return Completion((1,), (0.0,), finish_reason, 0, text)


@pytest.fixture(scope="module")
def reward():
    reward = create_reward("fim_python", timeout_s=5.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "value", "detail"),
    [
        ("a + 1", 1.0, ""),
        ("1 if a == 0 else 2", 0.5, "wrong value 2, expected 3"),
        ("a", 0.0, "wrong value 0, expected 1"),
        ("a +", 0.0, "SyntaxError: invalid syntax (solution, line 2)"),
        ("a / 0", 0.0, "ZeroDivisionError: division by zero"),
        ("'x' * 10 ** 10", 0.0, "MemoryError"),
    ],
)
def test_value_is_the_share_of_passed_tests(reward, text, value, detail):
    (score,) = reward.score([(prompt(), answer(text))])
    assert (score.value, score.passed, score.detail) == (value, value == 1.0, detail)


def test_binary_rewards_all_or_nothing():
    reward = create_reward("fim_python", binary=True, workers=1)
    texts = "a + 1", "1 if a == 0 else 2"
    assert [score.value for score in reward.score([(prompt(), answer(text)) for text in texts])] == [1.0, 0.0]
    reward.close()


def test_scores_come_in_order_and_equal_answers_are_judged_once(reward):
    texts = ["a + 1", "a", "a + 1", "a - 1"] * 25
    pairs = [(prompt(f"q{i % 2}"), answer(text)) for i, text in enumerate(texts)]
    scores = reward.score(pairs)
    assert [score.passed for score in scores] == [text == "a + 1" for text in texts]
    assert len(reward._cache) >= 3
    assert reward.score(pairs) == scores


def test_an_id_that_two_data_sets_have_is_scored_by_the_tests_of_each(reward):
    """Held-out problems may be those of training with tests that a lucky answer does not pass."""
    few, many = prompt("twice", tests=TESTS[:1]), prompt("twice")
    assert [reward.score([(one, answer("1"))])[0].value for one in (few, many, few)] == [1.0, 0.25, 1.0]


@pytest.mark.parametrize("first", ["a + 1", "7"])
def test_an_answer_that_is_out_of_time_is_judged_again(first):
    """It may have been the machine's fault, also where a test before has failed by itself."""
    late = f"{first} if a == 0 else sum(0 for _ in iter(int, 1))"
    reward = PythonFim(Sandbox(limits=Limits(cpu_s=1), workers=1))
    assert reward.score([(prompt(), answer(late))])[0].value == (0.25 if first == "a + 1" else 0.0)
    judged = []
    reward._sandbox.run = lambda jobs: judged.extend(jobs) or [Verdict((True,) * 4)] * len(jobs)
    assert reward.score([(prompt(), answer(late))])[0].passed
    assert len(judged) == 1
    reward.close()


def test_unfinished_answer_scores_zero(reward):
    scores = reward.score([(prompt(), answer("a + 1", reason)) for reason in ("stop", "length", "abort")])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]
    assert scores[1].detail == "not finished: length"


@pytest.mark.parametrize("preamble", ["import math\n", "import math"])
def test_preamble_stands_before_the_source_and_the_tests(reward, preamble):
    fields = {"preamble": preamble, "tests": ["assert candidate(4) == math.sqrt(4)"]}
    assert reward.score([(prompt("pre", **fields), answer("math.sqrt(a)"))])[0].passed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tests": []}, "has no tests"),
        ({"tests": ["assert ("]}, "cannot be run"),
        ({"suffix": None}, "no usable field"),
        ({"tests": [{"args": [1]}]}, "no usable field 'expect'"),
    ],
)
def test_unusable_problem_is_an_error_and_names_it(reward, fields, message):
    with pytest.raises(RewardError, match=f"'bad'.*{message}"):
        reward.score([(prompt("bad", **fields), answer("a"))])


def test_restricted_tier_refuses_problems_not_declared_pure():
    reward = PythonFim(Sandbox("restricted", workers=1))
    assert reward.score([(prompt(), answer("a + 1"))])[0].passed
    with pytest.raises(RewardError, match="not declared pure"):
        reward.score([(prompt(pure=False), answer("a + 1"))])
    reward.close()


def test_auto_dispatches_by_data_source():
    reward = create_reward("auto", workers=1)
    assert "fim_python: " in reward.tier
    assert reward.score([(prompt(), answer("a + 1"))])[0].passed
    with pytest.raises(RewardError, match=r"no verifier for data source.*gsm8k; there are fim_python"):
        reward.score([(replace(prompt(), data_source="gsm8k"), answer("1"))])
    reward.close()


def test_data_source_without_verifier_is_refused_before_anything_is_sampled():
    with pytest.raises(ConfigError, match=r"gsm8k; there are fim_python; .*--rm-type function:.*reward.lean_project"):
        create_reward("auto", workers=1, sources={"fim_python", "gsm8k"})


@pytest.mark.parametrize("options", [{"name": "nonsense"}, {"sandbox": "docker"}, {"workers": 0}, {"timeout_s": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError, match=r"choose|expected"):
        create_reward(**options)


def test_unsafe_tier_is_never_taken_unasked():
    with pytest.raises(SandboxError, match="unsafe-local"):
        create_reward("fim_python", sandbox="unsafe-local")


@pytest.fixture(scope="module")
def humaneval():
    """One hole per problem: the last of the multi-line ones that reach to the end of the body, i.e. a full body."""
    bodies = {}
    for record in problems("multi-line"):
        key = record["id"].split("/multi-line")[0]
        if key not in bodies or len(record["middle"]) > len(bodies[key]["middle"]):
            bodies[key] = record
    return [Prompt(key, (1,), "fim_python", record) for key, record in bodies.items()]


def test_humaneval_bodies_pass_and_emptied_ones_do_not(reward, humaneval):
    """All 164 problems: the longest hole of each, filled canonically, and with `pass` or nothing instead."""
    assert len(humaneval) == 164

    def emptied(problem):
        middle = problem["middle"]
        return middle[: len(middle) - len(middle.lstrip())] + "pass\n"

    canonical = reward.score([(p, answer(p.problem["middle"])) for p in humaneval])
    assert [(p.id, s.detail) for p, s in zip(humaneval, canonical, strict=True) if s.value != 1.0] == []
    wrong = reward.score([(p, answer(emptied(p.problem))) for p in humaneval])
    assert [p.id for p, s in zip(humaneval, wrong, strict=True) if s.passed] == []


def test_a_rollout_batch_is_judged_in_a_fraction_of_a_second():
    """128 small problems of 4 tests: 0.2 s on two idle cores; the bound allows for a machine shared by many."""
    with Sandbox(limits=Limits(wall_s=30.0)) as sandbox:
        reward = PythonFim(sandbox)
        reward.score([(prompt("warm"), answer(f"a + 1 + {i}")) for i in range(8)])
        pairs = [(prompt(f"s{i}"), answer("a + 1")) for i in range(128)]
        begin = time.perf_counter()
        scores = reward.score(pairs)
        seconds = time.perf_counter() - begin
    assert all(score.passed for score in scores)
    print(f"{len(pairs)} problems in {seconds:.3f} s, {seconds / len(pairs) * 1e3:.2f} ms each ({sandbox.tier})")
    assert seconds < 6.0
