"""Ranks of a trainer beside engines of other sizes, and a run in shared mode with its memory looked at."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import Any

import cases
import psutil
import torch

from megatron_sglang.comm import TorchComm
from megatron_sglang.cycle import Cycle
from megatron_sglang.digests import digest
from megatron_sglang.engine import EngineOptions, create_engines
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.hf_files import tensor_shapes
from megatron_sglang.memory import GB, Ledger
from megatron_sglang.sync import publish
from megatron_sglang.training.offload import Offload
from megatron_sglang.training.paths import Paths
from megatron_sglang.training.shared import SharedCycle
from megatron_sglang.types import GenerateRequest, SamplingParams


def split(
    hf: str, layout: dict[str, Any], tp_size: int, count: int, python: str = "", kill: bool = False
) -> dict[str, Any]:
    """The same weights by three paths to `count` engines of `tp_size` ranks, twice. python: the engines' interpreter.
    kill: afterwards one engine rank is killed in the middle of a broadcast."""
    recipe, model, _, _ = cases.set_up(hf, layout)
    comm = TorchComm()
    leads = comm.rank == 0
    with contextlib.ExitStack() as cleanup:
        engine: Any = None
        if leads:
            own = {"python": python} if python else {}
            options = EngineOptions(
                hf, tp_size=tp_size, dtype="float32", device="cpu", max_total_tokens=4096, mem_fraction=0.1, **own
            )
            engine = cleanup.enter_context(create_engines(options, count))
        comm.agree(None)
        paths = Paths(
            comm=comm,
            bridge=recipe.bridge,
            model_chunks=model,
            dtype=torch.float32,
            bucket_bytes=1 << 20,
            shapes=tensor_shapes(hf),
            engine=engine,
            engine_ranks=tp_size * count,
        )
        generic, broadcast = paths.generic(), paths.broadcast()
        versions = itertools.count(1)
        publish(comm, engine, generic, next(versions))
        direct = paths.direct()
        digests: list[list[str]] = []
        for scale in (0.1, 0.2):
            cases.randomize(model, scale)
            every = (generic, broadcast, direct)
            digests.append([publish(comm, engine, path, next(versions)).engine_digest for path in every])
        found: dict[str, Any] = {"digests": digests, "exchanges": direct.exchanges}
        found["buckets"] = len(direct.sender.buckets)
        if leads:
            request = GenerateRequest((1, 40, 2), SamplingParams(temperature=0.0, max_new_tokens=2))
            found["version"] = engine.generate([request])[0].weight_version
            found["links"] = sorted({one.cmdline()[0] for one in _tree(engine) if one.cmdline()[0].startswith("/")})
        if kill:
            found["killed"] = _killed(comm, engine, broadcast)
        return found


def _tree(engine: Any) -> list[psutil.Process]:
    supervisor = psutil.Process(engine.server.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def _killed(comm: TorchComm, engine: Any, path: Any) -> list[Any]:
    """Text of the error of a version in whose second bucket a rank dies, and the seconds until it was raised."""
    original, calls = (path.engine.load, []) if engine is not None else (None, [])

    def load(bucket: Any) -> None:
        calls.append(bucket.index)
        if bucket.index == 1:
            victim = next(one for one in _tree(engine) if "scheduler_TP1" in " ".join(one.cmdline()))
            threading.Timer(0.5, victim.kill).start()
            victim.suspend()
        assert original is not None
        original(bucket)

    if engine is not None:
        path.engine.load = load
    began = time.monotonic()
    try:
        publish(comm, engine, path, 99)
    except WeightSyncError as error:
        return [str(error), time.monotonic() - began, calls]
    return ["", 0.0, calls]


def turns(argv: list[str]) -> dict[str, Any]:
    """A whole run, and what was seen of this rank's memory at the end of every rollout phase and of the run."""
    seen: list[dict[str, Any]] = []
    movers: list[Offload] = []
    out, collect = Offload.out, SharedCycle.collect

    def spied_out(self: Offload) -> int:
        movers[:] = [self]
        before = _contents(self)
        moved = out(self)
        seen.append({"moved": moved, "before": before})
        return moved

    def spied_collect(self: SharedCycle, step: int) -> Any:
        inside = _contents(movers[0])
        samples = collect(self, step)
        seen[-1] |= {"away": inside, "after": _contents(movers[0])}
        return samples

    Offload.out, SharedCycle.collect = spied_out, spied_collect  # type: ignore[method-assign]
    try:
        error = cases.run(argv)
    finally:
        Offload.out, SharedCycle.collect = out, collect  # type: ignore[method-assign]
    assert not error, error
    return {"seen": seen}


def _contents(mover: Offload) -> list[list[int]]:
    """(identity of the tensor, its bytes, their digest) of each parameter, and of each state of the optimizer."""
    parts = getattr(mover.optimizer, "chained_optimizers", [mover.optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    parameters = [parameter for chunk in mover.model_chunks for parameter in chunk.module.parameters()]
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return [
        [id(tensor), size := tensor.untyped_storage().nbytes(), digest(tensor.detach()) if size else 0]
        for tensor in (*parameters, *moments)
    ]


def without_room(argv: list[str]) -> str:
    """The error of a run whose trainer keeps 60 of the 80 GB that are free when the leader's engine has given 50."""
    free = {"gb": 30.0}
    Ledger.of_device = classmethod(lambda cls: cls(lambda: int(free["gb"] * GB)))  # type: ignore[method-assign]
    release, note = HttpEngine.release, Cycle.note_memory

    def released(self: HttpEngine, *given: Any) -> None:
        release(self, *given)
        free["gb"] = 80.0

    def noted(self: Cycle, phase: str, **given: Any) -> None:
        note(self, phase, **given)
        if phase == "train":
            free["gb"] = 20.0

    HttpEngine.release, Cycle.note_memory = released, noted  # type: ignore[method-assign]
    return cases.run(argv)
