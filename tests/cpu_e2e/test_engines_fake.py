"""Several engines as one, against the scriptable one: whoever serves, the same answer; one fails, none serves."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_tools import fake_options, script

from megatron_sglang.buckets import pack
from megatron_sglang.engine import EngineOptions, create_engine, create_engines, supervised
from megatron_sglang.engine.group import EngineGroup, spread
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.line import open_line
from megatron_sglang.errors import (
    EngineDiedError,
    EngineError,
    EngineStaleError,
    EngineStartError,
    WeightSyncError,
)
from megatron_sglang.types import GenerateRequest, SamplingParams

pytestmark = pytest.mark.timeout(200)
WEIGHTS = [("a", torch.arange(12.0).view(3, 4)), ("b", torch.arange(5))]
REQUESTS = [
    GenerateRequest((prompt, 2, 3), SamplingParams(max_new_tokens=8, seed=10 * prompt + member))
    for prompt in range(5)
    for member in range(3)
]
LOADER = "/update_weights_from_tensor"
FORCED: dict[str, Any] = {"path": LOADER, "do": "status"}


def options(**changes: object) -> EngineOptions:
    """The first update imports torch, in all of them at the same time."""
    return fake_options(**({"update_timeout_s": 40.0} | changes))


def publish(engine: EngineGroup | HttpEngine, version: int) -> str:
    engine.begin_update(version)
    engine.load(pack(version, 0, WEIGHTS))
    return engine.commit_update(version, 1)


def processes(group: EngineGroup) -> list[psutil.Process]:
    supervisors = [psutil.Process(engine.server.pid) for engine in group.engines]
    return [*supervisors, *(child for one in supervisors for child in one.children(recursive=True))]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineGroup]:
    log_path = tmp_path_factory.mktemp("engines") / "engine.log"
    group = create_engines(options(log_path=str(log_path)), 2)
    assert isinstance(group, EngineGroup)
    with group:
        with pytest.raises(EngineStaleError, match=r"engine 0: .*no weights were published yet"):
            group.generate(REQUESTS)
        yield group


@pytest.fixture
def group(shared: EngineGroup) -> EngineGroup:
    """Two serving engines without faults."""
    for engine in shared.engines:
        script(engine)
    publish(shared, next_version(shared))
    return shared


def next_version(group: EngineGroup) -> int:
    return max(engine.version or 0 for engine in group.engines) + 1


def test_an_engine_for_which_no_request_is_left_is_asked_for_none(group: EngineGroup) -> None:
    """Members of a group of requests stay together, and SGLang refuses a message without any: a run with more engines
    than prompts would not start."""
    same = REQUESTS[:3]
    group.warm_up(same)
    assert len(group.generate(same)) == 3


def test_one_engine_is_no_group() -> None:
    """What has run on GPUs must stay what it was."""
    assert isinstance(create_engines(options(), 1), HttpEngine)


def test_it_does_not_matter_who_serves(group: EngineGroup) -> None:
    """Answers in the order of the requests, each the same as from one engine that serves all."""
    answers = group.generate(REQUESTS)
    for engine in group.engines:
        assert answers == engine.generate(REQUESTS)
    assert group.generate(REQUESTS[7:]) == answers[7:]
    assert group.generate([]) == []
    assert len({answer.token_ids_T for answer in answers}) == len(REQUESTS), "each has its own seed"
    with create_engine(options()) as alone:
        assert publish(alone, 1) == publish(group, next_version(group)), "the digest says which weights, not how often"


def test_both_have_a_part(group: EngineGroup) -> None:
    """Or the second one's GPUs would idle."""
    for number in (0, 1):
        script(group.engines[number], {"path": "/generate", "do": "status"})
        with pytest.raises(EngineError, match=f"engine {number}: engine answered /generate with 500"):
            group.generate(REQUESTS)


def test_logs_are_apart(group: EngineGroup) -> None:
    paths = [engine.server.log_path for engine in group.engines]
    assert [path.name for path in paths if path] == ["engine.log", "engine1.log"]
    assert all(path.exists() for path in paths if path)


def stream(group: EngineGroup) -> None:
    """As the trainer ranks do it; the fake engine takes no plan, so its ranks refuse."""
    group.begin_update(version := next_version(group), direct=True)
    call = group.open_stream(version)
    group.start_stream(call)
    try:
        with open_line(call, 3) as last:
            last.send({"index": 0}, 0, torch.ones(1), torch.ones(1))
    finally:
        group.end_stream(gave_up=True)


def commit_without_stream(group: EngineGroup) -> None:
    group.begin_update(version := next_version(group), direct=True)
    group.commit_update(version, 2)


UPDATE: dict[str, tuple[Callable[[EngineGroup], object], dict[str, Any] | None, str]] = {
    "begin": (lambda group: publish(group, next_version(group)), FORCED, r"1: weight version \d+, begin: "),
    "flush": (
        lambda group: publish(group, next_version(group)),
        {"path": "/pause_generation", "do": "status"},
        r"1: weight version \d+, begin: ",
    ),
    "load": (
        lambda group: publish(group, next_version(group)),
        {**FORCED, "do": "flip_bit", "after": 1},
        r"1: weight version \d+, bucket 0, engine rank 0: .* bytes changed",
    ),
    "commit": (
        lambda group: publish(group, next_version(group)),
        {**FORCED, "do": "no_answer", "after": 2},
        r"1: weight version \d+, commit, engine rank 0: no answer",
    ),
    "after the commit of the other": (
        lambda group: publish(group, next_version(group)),
        {"path": "/continue_generation", "do": "status"},
        r"1: weight version \d+, commit: ",
    ),
    "layout": (lambda group: group.layout({}), None, "0: layout, engine rank 0: .* has no layout"),
    "plan": (lambda group: group.install_plan([{}] * 4), None, "0: transfer plan, engine rank 0: .* has no layout"),
    "stream": (stream, None, r"0: weight version \d+, stream, engine rank 0: a stream was opened before any plan"),
    "no stream": (commit_without_stream, None, r"0: weight version \d+, commit: no stream of this version has ended"),
}


@pytest.mark.parametrize("step", UPDATE)
def test_one_that_fails_a_step_makes_all_stale_until_the_next_good_update(group: EngineGroup, step: str) -> None:
    """Half of a batch sampled from old weights would look like any other."""
    run, fault, text = UPDATE[step]
    if fault is not None:
        script(group.engines[1], fault)
    with pytest.raises(WeightSyncError, match=f"engine {text}"):
        run(group)
    for engine in (group, *group.engines):
        with pytest.raises(EngineStaleError, match="last update failed: engine"):
            engine.generate(REQUESTS)
    for engine in group.engines:
        script(engine)
    publish(group, version := next_version(group))
    assert {answer.weight_version for answer in group.generate(REQUESTS)} == {version}


def test_a_mistake_of_the_caller_changes_nothing(group: EngineGroup) -> None:
    """As with one engine: it must not take healthy ones out of service."""
    with pytest.raises(WeightSyncError, match=r"engine 0: .*no update is open; call begin_update\(99\) first"):
        group.load(pack(99, 0, WEIGHTS))
    assert group.generate(REQUESTS)


def test_other_weights_in_one_of_them_are_found_at_commit() -> None:
    """Each has proved that it holds what it was sent; that it is the same in all of them, only the group can see."""
    with EngineGroup(spread(options(), 2)) as group:
        odd = group.engines[1]
        odd.begin_update(1)
        odd.load(pack(1, 0, [("c", torch.arange(3))]))  # integers are not poisoned when the next update begins
        with pytest.raises(
            WeightSyncError, match=r"commit: .* different weights.*: engine 0 (\w+), engine 1 (?!\1)\w+; "
        ):
            publish(group, 1)
        for engine in (group, *group.engines):
            with pytest.raises(EngineStaleError, match="different weights"):
                engine.generate(REQUESTS)
        script(odd, {"path": "/release_memory_occupation", "do": "die"})
        with pytest.raises(EngineDiedError, match="engine 1: engine died during /release_memory_occupation"):
            group.release()


def test_nobody_waits_for_the_others_of_a_dead_engine() -> None:
    """A rollout may take ten minutes; the reason should not."""
    slow, dying = ({"path": "/generate", "do": do, "seconds": 30.0} for do in ("sleep", "die"))
    pair = [options(extra={"faults": [fault]}, request_timeout_s=40.0) for fault in (slow, dying)]
    with EngineGroup(pair) as group:
        tree = processes(group)
        publish(group, 1)
        began = time.monotonic()
        with pytest.raises(EngineDiedError, match="engine 1: engine died during /generate: exit code"):
            group.generate(REQUESTS)
        assert time.monotonic() - began < 15
    assert not psutil.wait_procs(tree, 10)[1]


def test_release_and_update(group: EngineGroup) -> None:
    group.release()
    with pytest.raises(EngineStaleError, match=r"engine 0: .*its memory is released"):
        group.generate(REQUESTS)
    publish(group, next_version(group))
    assert group.generate(REQUESTS)


@pytest.mark.parametrize("step", ["start", "wait_ready"])
def test_one_that_does_not_come_up_leaves_none(tmp_path: Path, step: str) -> None:
    """Servers without a trainer would hold their GPUs. Nor is the slow one waited for."""
    slow, dying = ({"faults": [{"path": "start", "do": do, "seconds": 60.0}]} for do in ("sleep", "die"))
    pair = spread(options(log_path=str(tmp_path / "engine.log"), start_timeout_s=50.0), 2)
    pair = [dataclasses.replace(one, extra=extra) for one, extra in zip(pair, (slow, dying), strict=True)]
    if step == "start":
        pair[1] = dataclasses.replace(pair[1], python="/nonexistent/python")
    group, before = EngineGroup(pair), psutil.Process().children()
    began = time.monotonic()
    if step == "start":
        with pytest.raises(FileNotFoundError):
            group.start()
    else:
        group.start()
        with pytest.raises(EngineStartError, match=r"engine 1: engine did not come up: exit code .*engine1.log"):
            group.wait_ready()
    assert time.monotonic() - began < 30
    assert [engine.server.pid for engine in group.engines] == [None, None]
    assert psutil.Process().children() == before
    group.close()


def test_close_ends_all_even_if_that_fails_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is closed once; whatever it leaves then stays."""
    group = EngineGroup(spread(options(), 2))
    group.start()
    group.wait_ready()
    tree = processes(group)
    folders = [engine.server.mailbox.parent for engine in group.engines]
    monkeypatch.setattr(supervised, "CLOSE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        group.engines[0].server.port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=r"engine 0: port \d+ still answers"):
            group.close()
    assert not psutil.wait_procs(tree, 20)[1]
    assert not any(folder.exists() for folder in folders)
    group.close()
