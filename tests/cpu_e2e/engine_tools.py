"""What the tests of engines share: options for a small one and a fake one, buckets, publishing as the trainer does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import torch

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.engine import EngineOptions

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

GIGABYTE = 1 << 30
Weights = dict[str, torch.Tensor]


def make_buckets(version: int, weights: Weights, size: int = GIGABYTE) -> list[Bucket]:
    """All of `weights` in buckets of at most `size` bytes (one tensor at least)."""
    groups: list[list[tuple[str, torch.Tensor]]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if groups[-1] and filled + tensor.nbytes > size:
            groups.append([])
            filled = 0
        groups[-1].append((name, tensor))
        filled += tensor.nbytes
    return [pack(version, index, group) for index, group in enumerate(groups)]


class Publisher:
    """Publishes weights as the trainer does, with versions that only grow."""

    def __init__(self, engine: HttpEngine) -> None:
        self.engine = engine

    def __call__(self, weights: Weights, size: int = GIGABYTE) -> str:
        version = self.next_version
        buckets = make_buckets(version, weights, size)
        self.engine.begin_update(version)
        for bucket in buckets:
            self.engine.load(bucket)
        return self.engine.commit_update(version, len(buckets))

    @property
    def next_version(self) -> int:
        return (self.engine.version or 0) + 1


def shared_memory(pid: int) -> set[Path]:
    """Files of /dev/shm that processes below this one have mapped."""
    found: set[Path] = set()
    for process in psutil.Process(pid).children(recursive=True):
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        found |= {Path(line.split()[-1]) for line in maps if "/dev/shm/" in line and "(deleted)" not in line}
    return found


def engine_options(model: Path, **changes: object) -> EngineOptions:
    """A small fp32 engine with short deadlines."""
    common: dict[str, object] = {
        "tp_size": 2,
        "dtype": "float32",
        "max_total_tokens": 16384,
        "max_running_requests": 128,
        "mem_fraction": 0.1,
        "device": "cpu",
        "start_timeout_s": 300.0,
        "request_timeout_s": 120.0,
        "update_timeout_s": 60.0,
    }
    return EngineOptions(str(model), **(common | changes))  # pyright: ignore[reportArgumentType]


def fake_options(**changes: object) -> EngineOptions:
    """A fake engine with short deadlines, but for its updates: the first one imports torch."""
    common: dict[str, object] = {
        "kind": "fake",
        "tp_size": 2,
        "start_timeout_s": 50.0,
        "request_timeout_s": 10.0,
        "update_timeout_s": 60.0,
    }
    return EngineOptions("unused", **(common | changes))  # pyright: ignore[reportArgumentType]


def script(engine: HttpEngine, *faults: dict[str, Any], token_s: float = 0.0) -> int:
    """Replace the faults of a running fake engine, and its seconds for each token. How many requests run."""
    headers = {"Authorization": f"Bearer {engine.server.admin_key}"}
    url = f"http://127.0.0.1:{engine.server.port}/script"
    answer = httpx.post(url, json={"faults": faults, "token_s": token_s}, headers=headers, trust_env=False)
    return answer.raise_for_status().json()["running"]


async def until_running(engine: HttpEngine, *faults: dict[str, Any], token_s: float = 0.0, count: int = 1) -> None:
    """Wait until `count` requests run in a fake engine, which takes a while on a busy machine; the rest: its script."""
    async with asyncio.timeout(20):
        while script(engine, *faults, token_s=token_s) < count:
            await asyncio.sleep(0.02)


async def until_decoding(engine: HttpEngine, count: int) -> None:
    """Wait until a real SGLang runs as many requests, which takes a while on a busy machine."""

    def running() -> int:
        loads = engine.connected.get("/v1/loads", 10.0, include="core").json()["loads"]
        return sum(load["num_running_reqs"] for load in loads)

    async with asyncio.timeout(60):
        while await asyncio.to_thread(running) < count:
            await asyncio.sleep(0.01)
