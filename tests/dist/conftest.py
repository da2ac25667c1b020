"""Real Megatron on several gloo ranks. One process imports it, ranks are forked from there (rank_server.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RunRanks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    """`run_ranks(N, "case", **arguments)` -> what the case returned on each rank; AssertionError with tracebacks."""
    with rank_server(tmp_path_factory) as run:
        yield run


@pytest.fixture(scope="module")
def run_interpreting_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    """The same with Triton's interpreter, which runs GPU kernels on a CPU; it is chosen when Triton is imported."""
    with rank_server(tmp_path_factory, TRITON_INTERPRET="1") as run:
        yield run


@contextlib.contextmanager
def rank_server(tmp_path_factory: pytest.TempPathFactory, **environment: str) -> Iterator[RunRanks]:
    log = (tmp_path_factory.mktemp("ranks") / "log.txt").open("w")
    here = str(Path(__file__).parent)  # for the user's modules of these tests, such as letter_reward
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("rank_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": here, **environment},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline(), f"the rank server did not come up; see {log.name}"

    def run(ranks: int, case: str, timeout_s: float = 240, **arguments: Any) -> list[Any]:
        job = {"ranks": ranks, "case": case, "args": arguments, "timeout_s": timeout_s}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        reply = json.loads(server.stdout.readline() or '{"error": "the rank server died"}')
        assert "ok" in reply, reply["error"]
        return reply["ok"]

    yield run
    server.stdin.close()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:  # how fast an interpreter with Megatron in it ends is nobody's claim
        server.kill()
        server.wait()
    log.close()
