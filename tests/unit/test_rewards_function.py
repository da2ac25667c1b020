"""A user's reward function: what it returns is the reward, and its faults stop training with a clear word."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from megatron_sglang.errors import ConfigError, RewardError
from megatron_sglang.rewards import create_reward
from megatron_sglang.types import Completion, Prompt

MODULE = """
import os, subprocess, time
from megatron_sglang.types import Completion, Prompt

def length(prompt, completion):
    assert isinstance(prompt, Prompt) and isinstance(completion, Completion)
    return len(completion.text) / prompt.problem["scale"] + 0 * completion.token_ids_T[0]

def by_text(prompt, completion):
    what = completion.text
    if what == "raise": raise ValueError("first line\\nno such thing")
    if what == "hang": time.sleep(60)
    if what == "exit": os._exit(3)
    if what == "checker": subprocess.run(["sleep", "61.25"])
    return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "abc"}.get(what, 0.25)

not_callable = 5
"""


@pytest.fixture
def create(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def create(name, **options):
        made.append(create_reward(f"function:my_rewards.{name}", **{"workers": 2, "timeout_s": 20.0} | options))
        return made[-1]

    yield create
    for reward in made:
        reward.close()


def pairs(*texts):
    return [
        (Prompt(f"id-{text}", (1,), "any", {"scale": 4}), Completion((1, 2), (0.0, 0.0), "stop", 0, text))
        for text in texts
    ]


def test_value_is_what_the_function_returns_and_runs_elsewhere(create):
    reward = create("length")
    scores = reward.score(pairs("a", "abcd", "ab"))
    assert [(score.value, score.passed) for score in scores] == [(0.25, False), (1.0, True), (0.5, False)]
    assert len(psutil.Process(os.getpid()).children()) >= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", "failed for prompt 'id-raise': .*no such thing"),
        ("nan", "failed for prompt 'id-nan': it returned nan"),
        ("inf", "it returned inf"),
        ("none", "failed for prompt 'id-none': TypeError.*; correct it"),
        ("raise", r"no such thing \(my_rewards.py:\d+\); correct it"),
        ("text", "ValueError: could not convert string"),
        ("exit", "ended its process .* for prompt 'id-exit'"),
    ],
)
def test_fault_names_function_prompt_and_last_line(create, text, message):
    reward = create("by_text", workers=1)
    with pytest.raises(RewardError, match=f"my_rewards.by_text .*{message}"):
        reward.score(pairs("fine", text))
    assert reward.score(pairs("fine"))[0].value == 0.25, "the worker is usable or replaced"


def test_hanging_function_is_killed_at_its_deadline(create):
    reward = create("by_text", workers=1, timeout_s=1.0)
    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"gave no answer in 1 s for prompt 'id-hang'; .*reward.timeout_s"):
        reward.score(pairs("hang"))
    assert time.monotonic() - begin < 10


def test_what_a_hanging_function_has_started_ends_with_it(create):
    """A program that checks answers, and hangs, went on for ever beside the run and after it."""
    reward = create("by_text", workers=1, timeout_s=1.0)
    with pytest.raises(RewardError, match="gave no answer"):
        reward.score(pairs("checker"))
    running = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "61.25"]]
    _, left = psutil.wait_procs(running, 5)
    for process in left:
        process.kill()
    assert not left


@pytest.mark.parametrize("name", ["missing", "not_callable"])
def test_unusable_function_is_refused_at_the_start(create, name):
    with pytest.raises(ConfigError, match=f"my_rewards.{name}: .*expected package.module.function, .*on PYTHONPATH"):
        create(name)


def test_close_ends_the_workers(create):
    before = set(psutil.Process().children())
    reward = create("length")
    started = set(psutil.Process().children()) - before
    assert len(started) == 2
    reward.close()
    reward.close()
    assert not [process for process in started if process.is_running()]
