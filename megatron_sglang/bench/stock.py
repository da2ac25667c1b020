"""The yardstick: a weight update from what Megatron-Bridge and SGLang ship, as trainers that build on both do it.

    gather      Bridge's `export_hf_weights`: merges the adapters, gathers every tensor whole on every rank
    flatten     one flat tensor a bucket, SGLang's FlattenedTensorBucket
    hand_over   /update_weights_from_tensor with load_format="flattened_bucket": every engine rank gets all of it, and
                the model's own loader cuts out its part; by value on a CPU, on a GPU as a CUDA IPC handle

Nothing of it is proved: no digests, no check that every parameter was filled. What the engine holds is told by SGLang's
own /weights_checker (`Checker`), which is asked after each path alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megatron_sglang import buckets
from megatron_sglang.digests import digest
from megatron_sglang.engine import wire
from megatron_sglang.engine.http import Http
from megatron_sglang.errors import EngineError
from megatron_sglang.interfaces import Comm
from megatron_sglang.types import MergeFidelity, SyncReport

if TYPE_CHECKING:
    from megatron_sglang.weights.standalone import Model

TIMEOUT_S = 300.0
LOOKED_AT = 32
"""Of tensors that differ, how many are compared element by element."""

NOTHING_KNOWN = MergeFidelity(0.0, 0.0, 0.0, {})
"""Bridge's merge does not say what the cast lost."""


def connect(engine: Any) -> Http:
    """To the server of an `HttpEngine`, beside its own client."""
    server = engine.server
    return Http(server.port, server.api_key, server.admin_key, server.why_dead)


class StockPath:
    """Collective over all ranks. http: on the leader only. engine_ranks: those of one engine, all beside a rank."""

    name = "stock"

    def __init__(
        self,
        comm: Comm,
        bridge: Any,
        model_chunks: list[Any],
        dtype: torch.dtype,
        bucket_bytes: int,
        http: Http | None,
        engine_ranks: int,
    ) -> None:
        self.comm, self.bridge, self.model_chunks = comm, bridge, model_chunks
        self.dtype, self.bucket_bytes, self.engine_ranks = dtype, bucket_bytes, engine_ranks
        self._http = http

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every full tensor by Bridge's own merge, in Bridge's order, in the engine's dtype."""
        for name, tensor in self.bridge.export_hf_weights(self.model_chunks, show_progress=False):
            yield name, tensor.detach().to(self.dtype)

    @torch.no_grad()
    def publish(self, version: int) -> SyncReport:
        """Its seconds are by phase. `EngineError` on all ranks if SGLang refuses a bucket."""
        seconds: dict[str, float] = dict.fromkeys(("begin", "gather", "flatten", "hand_over", "verify"), 0.0)
        with _timed(seconds, "begin"):
            self.comm.from_leader(self._pause)
        tensors = count = size = 0
        parts = buckets.fill(self.tensors(), lambda tensor: tensor.nbytes, self.bucket_bytes)
        while True:
            with _timed(seconds, "gather"):
                named = next(parts, None)
            if named is None:
                break
            with _timed(seconds, "flatten"):
                flat, metadata = flattened(named)
            with _timed(seconds, "hand_over"):
                self._hand_over(flat, metadata)
            tensors, count, size = tensors + len(named), count + 1, size + flat.numel()
        with _timed(seconds, "verify"):
            self.comm.from_leader(lambda: self._resume(version))
        return SyncReport(version, tensors, count, size, seconds, NOTHING_KNOWN, "")

    def _hand_over(self, flat: torch.Tensor, metadata: list[SimpleNamespace]) -> None:
        bucket = {"flattened_tensor": flat, "metadata": metadata}
        if flat.is_cuda:
            # Each rank lends its own copy to the engine rank on its GPU.
            lent = self.comm.rank < self.engine_ranks
            payloads = self.comm.gather(wire.pickled(bucket, by_handle=True) if lent else None)[: self.engine_ranks]
        else:
            payloads = [wire.pickled(bucket, by_handle=False)] * self.engine_ranks if self.comm.rank == 0 else []
        self.comm.from_leader(lambda: self._load(payloads))
        wire.collect_ipc()

    # ---- on the leader ----

    def _pause(self) -> None:
        self._leading.post("/pause_generation", {"mode": "abort"}, TIMEOUT_S)
        status = self._leading.get("/flush_cache", TIMEOUT_S, admin=True, timeout=10.0).status_code
        if status != 200:
            raise EngineError(f"engine answered /flush_cache with {status}; nobody else may use it meanwhile")

    def _load(self, payloads: list[Any]) -> None:
        body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket"}
        body |= {"flush_cache": False, "abort_all_requests": False}
        self._leading.post("/update_weights_from_tensor", body, TIMEOUT_S)

    def _resume(self, version: int) -> None:
        body = {"new_version": str(version), "abort_all_requests": False}
        self._leading.post("/update_weight_version", body, TIMEOUT_S)
        self._leading.post("/continue_generation", {}, TIMEOUT_S)

    @property
    def _leading(self) -> Http:
        assert self._http is not None, "only the leader talks to the engine"
        return self._http


def flattened(named: list[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, list[SimpleNamespace]]:
    """A flat uint8 tensor and what SGLang reads of each tensor in it (model_runner_components/weight_updater.py:355).

    SGLang's own class for the latter would bring all of SGLang into the trainer.
    """
    metadata, at = [], 0
    for name, tensor in named:
        end = at + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=at, end_idx=end, numel=tensor.nbytes
            )
        )
        at = end
    return torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in named]), metadata


@torch.no_grad()
def difference(path: StockPath, model: Model) -> dict[str, Any]:
    """How Bridge's merged tensors differ from ours: {"tensors", "different", "largest" absolute difference,
    "largest_update": what our merge changed of the same tensors, "first": names}. Collective; a few exports long."""
    from megatron_sglang.weights.export import hf_layers

    def ours(merge: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in hf_layers(model.bridge, model.chunks, dtype=path.dtype, merge=merge):
            yield from ((name, tensor.detach().to(path.dtype)) for name, tensor in layer)

    theirs = {name: digest(tensor) for name, tensor in path.tensors()}
    odd = [name for name, tensor in ours(merge=True) if theirs.get(name) != digest(tensor)]
    shown = set(odd[:LOOKED_AT])
    merged = {name: tensor.clone() for name, tensor in ours(merge=True) if name in shown}
    found = {"tensors": len(theirs), "different": len(odd), "largest": 0.0, "largest_update": 0.0, "first": odd[:3]}
    for key, tensors in (("largest", path.tensors()), ("largest_update", ours(merge=False))):
        for name, tensor in tensors:
            if name in shown:
                found[key] = max(found[key], (tensor.float() - merged[name].float()).abs().max().item())
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """What /weights_checker says the engine holds."""

    checksum: str
    """Over all ranks."""
    parameters: Mapping[str, str]
    """"rank/parameter" -> checksum."""
    seconds: float

    def differs_from(self, other: Held) -> list[str]:
        """Names of parameters, each of one rank."""
        names = self.parameters.keys() | other.parameters.keys()
        return sorted(name for name in names if self.parameters.get(name) != other.parameters.get(name))


def held_by(http: Http) -> Held:
    """Ask SGLang for checksums of all that its ranks hold; takes as long as hashing it."""
    began = time.perf_counter()
    answer = http.post("/weights_checker", {"action": "checksum"}, TIMEOUT_S)
    parameters = {
        f"{rank['parallelism_info']['tp_rank']}/{name}": checksum
        for rank in answer["ranks"]
        for name, checksum in rank["checksums"].items()
    }
    return Held(answer["per_engine_checksum"], parameters, time.perf_counter() - began)


class _timed:
    """Adds the seconds of a block, device included, to one phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[self._phase] += time.perf_counter() - self._began
