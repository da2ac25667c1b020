"""An engine's processes: how they start, fail to start, and end with their trainer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from engine_tools import Publisher, Weights, engine_options, shared_memory

from megatron_sglang.digests import digest
from megatron_sglang.engine import create_engine, line
from megatron_sglang.errors import EngineStaleError, EngineStartError, WeightSyncError
from megatron_sglang.sync_plan import receipt_of
from megatron_sglang.transfer import Box, Place, Region, cut, make_plan, slots_of
from megatron_sglang.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(400)]

PROMPT = tuple(range(5, 40))

TRAINER = """
    import json, sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from engine_tools import engine_options
    from megatron_sglang.engine import create_engine
    from megatron_sglang.types import GenerateRequest, SamplingParams

    engine = create_engine(engine_options(Path({model!r}), ep_size=2, load_format="auto", log_path={log!r}))
    engine.start()
    engine.wait_ready()
    [completion] = engine.generate([GenerateRequest({prompt!r}, SamplingParams(max_new_tokens=24, seed=3))])
    server = engine.server
    print(json.dumps([server.pid, server.port, str(server.mailbox), completion.token_ids_T]), flush=True)
    time.sleep(600)
"""


def test_killed_trainer_leaves_nothing(
    engine: HttpEngine, publish: Publisher, weights: Weights, tiny_model: Path, tmp_path: Path
) -> None:
    """After SIGKILL of the trainer an engine that lived on would hold its GPUs and ports for ever. Its weights come
    from disk and its experts are spread by EP=2: its tokens must be those of the TP=2 engine that got them from us. In
    /dev/shm goes what was its own, and what is of the living engine stays."""
    log = tmp_path / "engine.log"
    tests = str(Path(__file__).parent)
    script = TRAINER.format(tests=tests, model=str(tiny_model), log=str(log), prompt=PROMPT)
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        publish(weights)
        [expected] = engine.generate([GenerateRequest(PROMPT, SamplingParams(max_new_tokens=24, seed=3))])
        assert trainer.stdout is not None
        pid, port, mailbox, tokens = json.loads(trainer.stdout.readline() or "[]") or pytest.fail(
            log.read_text()[-3000:]
        )
        assert tuple(tokens) == expected.token_ids_T
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert len(tree) >= 5, "supervisor, server, two schedulers, detokenizer"
        assert len(shared := shared_memory(pid)) == 2, "a queue between ranks, figures of the load"
        assert engine.server.pid is not None
        living = shared_memory(engine.server.pid)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(10)
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive
    socket.create_server(("127.0.0.1", port)).close()
    assert not Path(mailbox).parent.exists()
    assert not [path for path in shared if path.exists()]
    assert living
    assert all(path.exists() for path in living)


def test_an_engine_rank_that_dies_amid_a_stream_ends_the_update(tiny_model: Path, weights: Weights) -> None:
    """Its trainer rank must not wait for it until the deadline, nor the others for that one; the log says who died."""
    with create_engine(engine_options(tiny_model, log_path="")) as engine:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        whole = [Region(0, name, Box(0, 0, *matrix(shape)), Place(name, 0, 1, 1)) for name, shape in shapes.items()]
        layouts = engine.layout(shapes)
        pieces = make_plan(whole, [slot for layout in layouts for slot in slots_of(layout, shapes)])
        plan = cut(pieces, 200_000)
        engine.install_plan([receipt_of(layout, plan) for layout in layouts])
        engine.begin_update(1, direct=True)
        call = engine.open_stream(1)
        with line.Line(call, 0), line.Line(call, 1) as second:
            engine.start_stream(call)
            data = torch.zeros(sum(piece.size for piece in plan[0] if piece.target == 1))
            header = {"index": 0, "lengths": [len(data)], "digests": [digest(data)], "dtype": "float32"}
            second.send(header, 0, data, data)
            second.wait(0)
            server = psutil.Process(engine.server.pid)
            shared = shared_memory(server.pid)
            [victim] = [p for p in server.children(recursive=True) if "scheduler_TP1" in "".join(p.cmdline())]
            victim.kill()
            began = time.monotonic()
            with pytest.raises(WeightSyncError, match=r"after 1 deliveries, engine rank 1: the other side"):
                send_and_wait(second, {**header, "index": 1}, data)
        with pytest.raises(WeightSyncError, match="stream"):
            engine.end_stream(gave_up=True)
        assert time.monotonic() - began < 60
        with pytest.raises(EngineStaleError):
            engine.generate([GenerateRequest(PROMPT, SamplingParams(max_new_tokens=2, seed=3))])
    assert len(shared) == 2
    assert not [path for path in shared if path.exists()]


def send_and_wait(end: line.Line, header: dict[str, Any], data: torch.Tensor) -> None:
    """Whether the death is noticed by the first or the second is a matter of time."""
    end.send(header, 1, data, data)
    end.wait(1)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def test_engine_that_dies_at_start_shows_its_log(tmp_path: Path) -> None:
    """Without the log's last lines in the error, the user of a cluster has to go and look for them."""
    # Of an architecture that SGLang knows: for another it imports all of its models, which takes longer than the rest.
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "no_such_type"}')
    engine = create_engine(engine_options(tmp_path, tp_size=1))
    started = time.monotonic()
    with pytest.raises(EngineStartError, match="no_such_type"), engine:
        pass
    assert time.monotonic() - started < 200
    assert engine.server.why_dead() == "it is not started"
    assert os.environ.get("TORCHELASTIC_USE_AGENT_STORE") is None
