"""What the ranks of test_methods.py do: publish the same versions of Megatron's model by several sync methods."""

from __future__ import annotations

import contextlib
from typing import Any

import cases
import torch

from megatron_sglang.comm import TorchComm
from megatron_sglang.config import LoraConfig
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.hf_files import tensor_shapes
from megatron_sglang.sync import publish
from megatron_sglang.training.paths import Paths

METHODS = ("generic", "disk", "merge-on-engine")


def _paths(
    comm: TorchComm, recipe: Any, model: Any, hf: str, folder: str, engine: Any = None, engine_ranks: int = 1
) -> Paths:
    return Paths(
        comm=comm,
        bridge=recipe.bridge,
        model_chunks=model,
        dtype=torch.float32,
        bucket_bytes=200_000,
        shapes=tensor_shapes(hf),
        engine=engine,
        engine_ranks=engine_ranks,
        hf_path=hf,
        home=folder,
        lora=LoraConfig(rank=8, alpha=16),
    )


def agree(hf: str, layout: dict[str, Any], engine: dict[str, Any], folder: str) -> dict[str, Any]:
    """By method, for each of two versions: engine digest, and what merging changed. And what a PEFT folder holds."""
    recipe, model, _, _ = cases.set_up(hf, layout)
    comm = TorchComm()
    with contextlib.ExitStack() as stack:
        server = None
        if comm.rank == 0:
            options = EngineOptions(
                hf, dtype="float32", mem_fraction=0.1, max_total_tokens=1024, device="cpu", **engine
            )
            server = create_engine(options)
            stack.callback(server.close)
            server.start()
        comm.from_leader(lambda: server and server.wait_ready())
        paths = _paths(comm, recipe, model, hf, folder, server, engine["tp_size"])
        made = {name: paths.of(name)[0] for name in METHODS}
        found: dict[str, list[Any]] = {name: [] for name in METHODS}
        for version, scale in ((1, 0.1), (2, 0.3)):
            cases.randomize(model, scale)
            for name, path in made.items():
                report = publish(comm, server, path, version)
                layers = {str(layer): norms[0] for layer, norms in report.fidelity.layers.items()}
                found[name].append([report.engine_digest, report.fidelity.update_norm, report.fidelity.changed, layers])
        adapters = paths._adapters()
        written = adapters.write(1)
        return {**found, "bytes": report.bytes, "adapter": [written.tensors, adapters.fidelity().update_norm]}


def full_disk(hf: str, layout: dict[str, Any], folder: str) -> str:
    """The error on each rank when one of them cannot write."""
    import resource

    recipe, model, _, _ = cases.set_up(hf, layout)
    comm = TorchComm()
    paths = _paths(comm, recipe, model, hf, folder)
    writer = paths.disk().writer
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        writer.write(1)
    except WeightSyncError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


class _Untraced:
    """The part of an engine that making a direct path asks first."""

    def __init__(self) -> None:
        self.tested: list[int] = []

    def self_test(self, weights: dict[str, torch.Tensor]) -> list[Any]:
        assert all(tensor.dtype == torch.float32 and tensor.std() > 0.5 for tensor in weights.values())
        self.tested.append(len(weights))
        return []

    def layout(self, shapes: Any) -> list[Any]:
        raise WeightSyncError("layout, engine rank 0: nothing to trace")


def direct_alone(hf: str) -> dict[str, Any]:
    """What was asked of an engine whose layout is not to be compared with the generic path."""
    recipe, model, _, _ = cases.set_up(hf, {})
    engine = _Untraced()
    path, make = _paths(TorchComm(), recipe, model, hf, "", engine).of("direct")
    assert path is None
    assert make is not None
    try:
        make()
    except WeightSyncError as error:
        return {"tested": engine.tested, "error": str(error)}
    return {"tested": engine.tested, "error": ""}
