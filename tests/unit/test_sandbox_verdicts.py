"""Verdicts: right answers pass, and nothing a solution does makes a wrong one pass."""

from __future__ import annotations

import contextlib
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.rewards.box.literals import ChannelError, pack, same, unpack
from megatron_sglang.rewards.sandbox import Job, Limits, Sandbox

CALL = {"args": [1], "expect": 2}
STATEMENT = "assert candidate(1) == 2, 'not two'"
LENIENT = """
try:
    candidate(1)
except BaseException:
    pass
"""


@pytest.fixture(scope="module", params=["namespaces", "unsafe-local"])
def sandbox(request):
    with Sandbox(request.param, unsafe=True, limits=Limits(cpu_s=1, wall_s=4.0), workers=2) as sandbox:
        yield sandbox


def judge(sandbox: Sandbox, source: str, *tests, preamble: str = ""):
    (verdict,) = sandbox.run([Job(source, "f", tests, preamble)])
    return verdict


def test_right_answer_passes_both_kinds_of_tests(sandbox):
    source = "K = 1\ndef f(a, b=0):\n    return a + K + b\n"
    tests = CALL, STATEMENT, "x = 5\nassert candidate(x, b=1) == 7", {"args": [3, 4], "expect": 8}
    assert judge(sandbox, source, *tests).passed == (True,) * 4


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("def f(a):\n    return a\n", "wrong value 1, expected 2"),
        ("def f(a):\n    return 2.0\n", "wrong value 2.0, expected 2"),
        ("def f(a:\n", "SyntaxError"),
        ("g = 1\n", "NameError: f is not defined"),
        ("def f(a):\n    return {}['x']\n", "KeyError: x"),
        ("def f(a):\n    return undefined\n", "NameError: name 'undefined'"),
        ("def f():\n    return 2\n", "TypeError: f() takes 0"),
        ("class E(Exception): pass\ndef f(a):\n    raise E('mine')\n", "E: mine"),
        ("def f(a):\n    return object()\n", "TypeError: a value of type object is not a literal"),
        ("def f(a):\n    x = []\n    x.append(x)\n    return x\n", "RecursionError"),
        ("f = 5\n", "TypeError: 'int' object is not callable"),
        ("raise SystemExit\ndef f(a):\n    return 2\n", "SystemExit"),
    ],
)
def test_reason_of_failure_is_told(sandbox, source, detail):
    verdict = judge(sandbox, source, CALL, CALL)
    assert verdict.passed == (False, False)
    assert verdict.detail.startswith(detail)


@pytest.mark.parametrize("test", [CALL, STATEMENT])
@pytest.mark.parametrize("line", ["return {}[chr(0xDC80)]", "raise ValueError('\\udc80')"])
def test_half_a_surrogate_pair_does_not_leave_the_sandbox(sandbox, line, test):
    """Neither the run's log nor a tokenizer takes one, so a completion could end the run."""
    verdict = judge(sandbox, f"def f(a):\n    {line}\n", test)
    verdict.detail.encode()
    assert verdict.passed == (False,)


def test_half_a_surrogate_pair_in_broken_tests_does_not_leave_the_sandbox(sandbox):
    verdict = judge(sandbox, "def f(a):\n    return 2\n", STATEMENT, preamble="raise ValueError('\\udc80')")
    assert "\\udc80" in verdict.broken


def test_message_of_a_failed_assert_is_told(sandbox):
    assert judge(sandbox, "def f(a):\n    return 3\n", STATEMENT).detail == "assertion failed not two"


def frame(message: object) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


def writes_everywhere(data: bytes) -> str:
    return f"""
import os
for fd in range(64):
    try:
        os.write(fd, {data!r})
    except OSError:
        pass
def f(a):
    return 3
"""


NESTED = b"[" * 60_000
FORGERIES = {
    "prints": "print('PASS'); print('{\"ok\": true}')\ndef f(a):\n    return 3\n",
    "exits at once": "import os\nos._exit(0)\ndef f(a):\n    return 3\n",
    "exits in the call": "import os\ndef f(a):\n    os._exit(0)\n",
    "sys.exit": "import sys\ndef f(a):\n    sys.exit(0)\n",
    "kills itself": "import os, signal\ndef f(a):\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    "kills the others": "import os, signal\ndef f(a):\n    os.kill(os.getppid(), signal.SIGTERM)\n    return 3\n",
    "always equal": "class T(int):\n    def __eq__(self, o): return True\ndef f(a):\n    return T(3)\n",
    "no literal": "class T:\n    def __eq__(self, o): return True\ndef f(a):\n    return T()\n",
    "list subclass": "class T(list):\n    def __eq__(self, o): return True\ndef f(a):\n    return T()\n",
    "patches builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.exec = print\n"
    "def f(a):\n    return 3\n",
    "patches the protocol": "from megatron_sglang.rewards.box import literals, tasks\n"
    "literals.same = tasks.same = lambda *a: True\ntasks.judge = print\ndef f(a):\n    return 3\n",
    "writes verdicts everywhere": writes_everywhere(frame({"ok": True, "detail": "", "gone": False}) * 9),
    "answers nonsense": writes_everywhere(b"\0\0\0\4junk" * 9),
    "announces a huge frame": writes_everywhere(b"\xff" * 64),
    "nests deeply": writes_everywhere(len(NESTED).to_bytes(4, "big") + NESTED),
    "closes the channel": "import os\nos.closerange(3, 64)\ndef f(a):\n    return 3\n",
    "raises an assertion": "def f(a):\n    raise AssertionError\n",
    "hides in an exception": "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(a):\n    raise E\n",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_verdict_cannot_be_forged(sandbox, name):
    assert judge(sandbox, FORGERIES[name], CALL, STATEMENT).passed == (False, False)


@pytest.mark.parametrize("name", ["exits in the call", "exits at once", "answers nonsense", "closes the channel"])
def test_vanished_solution_fails_even_a_test_that_swallows_everything(sandbox, name):
    assert judge(sandbox, FORGERIES[name], LENIENT).passed == (False,)


def test_a_solution_cannot_end_a_tests_map(sandbox):
    """StopIteration within `map` ends it without a word: nothing was looked at, and all of nothing is true."""
    source = "def f(a):\n    raise StopIteration\n"
    tests = ("assert all(map(candidate, [1, 2]))", "assert set(map(candidate, [1, 2])) <= {True}")
    verdict = judge(sandbox, source, *tests)
    assert (verdict.passed, verdict.detail) == ((False, False), "StopIteration: ")


def test_exceptions_reach_the_tests_as_their_builtin_class(sandbox):
    source = "def f(a):\n    raise ValueError('negative') if a < 0 else KeyError(a)\n"
    expects_it = (
        "try:\n    candidate(-1)\nexcept ValueError as e:\n    assert 'negative' in str(e)\nelse:\n    assert False"
    )
    wrong_one = expects_it.replace("-1", "1")
    assert judge(sandbox, source, expects_it, wrong_one).passed == (True, False)


def test_values_keep_type_and_value_in_both_directions(sandbox):
    source = "def f(*args):\n    return args\n"
    test = """
values = (None, True, 0, -1, 10 ** 5000, 1.5, -0.0, float("inf"), "\\ud800 ü", b"\\x00", [1, [2]], (), (1,),
          {1: "a", (2, 3): {4}}, set(), frozenset({1}), 3 - 4j, bytearray(b"x"))
back = candidate(*values)
assert back == values and [type(b) for b in back] == [type(v) for v in values], back
assert candidate(float("nan"))[0] != 0
"""
    assert judge(sandbox, source, test).detail == ""


def test_nested_sets_are_told_apart():
    """As keys they are texts, which must show where an inner set ends."""
    assert not same({(frozenset({1, 2}), 3)}, {(frozenset({1, 2, 3}),)})
    assert not same({frozenset({frozenset({2}), 1})}, {frozenset({frozenset({2, 1})})})
    assert same({(frozenset({2, 1}), 3)}, {(frozenset({1, 2}), 3)})


def test_preamble_is_known_to_the_tests(sandbox):
    preamble = "import math\ndef double(x):\n    return 2 * x\n"
    verdict = judge(sandbox, "def f(a):\n    return a * 2\n", "assert candidate(4) == double(4)", preamble=preamble)
    assert verdict.passed == (True,)


@pytest.mark.parametrize(("test", "preamble"), [("assert (", ""), ("assert candidate(1)", "import nonsense")])
def test_broken_tests_are_told_apart_from_wrong_answers(sandbox, test, preamble):
    assert "Error" in judge(sandbox, "def f(a):\n    return 2\n", test, preamble=preamble).broken


@pytest.mark.parametrize(
    ("given", "expect"),
    [("x" * (1 << 20), 1 << 20), (1, "x" * (1 << 20)), ("x" * (1 << 24), 1 << 24)],
    ids=["args", "expect", "job"],
)
def test_tests_that_cannot_travel_are_the_data_sets_fault(sandbox, given, expect):
    """Else the right answer would score 0, or the sandbox be said to be broken."""
    source = "def f(a):\n    return len(a) if a != 1 else 'x' * (1 << 20)\n"
    small = {"args": ["x"], "expect": 1}
    verdicts = sandbox.run(
        [Job(source, "f", tests) for tests in ((small, {"args": [given], "expect": expect}), (small,))]
    )
    assert re.search(r"a message of \d+ bytes is over the limit of \d+", verdicts[0].broken)
    assert verdicts[1].passed == (True,)


def test_jobs_see_nothing_of_each_other(sandbox):
    leaves = (
        "import builtins, sys, os\nbuiltins.leak = sys.leak = 1\nopen('leak', 'w').close()\ndef f(a):\n    return 2\n"
    )
    looks = "import sys, os\ndef f(a):\n    return 1 + (not hasattr(sys, 'leak') and not os.path.exists('leak'))\n"
    verdicts = sandbox.run([Job(source, "f", (CALL,)) for source in (leaves, looks) * 4])
    assert [verdict.passed for verdict in verdicts] == [(True,)] * 8


def test_random_numbers_are_the_same_every_time(sandbox):
    source = "import random\ndef f(a):\n    return random.random(), list({'a', 'b', 'c', 'd'})\n"
    first, *others = (judge(sandbox, source, CALL).detail for _ in range(4))
    assert others == [first] * 3


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@settings(max_examples=60)
@given(literals)
def test_every_literal_survives_the_wire(value):
    assert same(unpack(json.loads(json.dumps(pack(value)))), value)


@settings(max_examples=60)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i)))
def test_hostile_forms_raise_only_channel_errors(form):
    with contextlib.suppress(ChannelError):
        unpack(form)


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, True), (1, 1.0), ([1], (1,)), ({1: 2}, {True: 2}), ({1}, {1.0}), (0.0, 1e-300), ("1", 1), ([], None)],
)
def test_same_tells_types_apart(left, right):
    assert not same(left, right)
    assert same(left, left)
    assert same(math.nan, math.nan)
