"""The paths of `sync.py` and the methods of `sync_methods.py`, put together from the rooms: Megatron's weights on one
side, the engine on the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sglang.config import LoraConfig
from megatron_sglang.engine.broadcast import Broadcast
from megatron_sglang.engine.line import open_line
from megatron_sglang.engine.method_calls import MethodCalls
from megatron_sglang.errors import ConfigError
from megatron_sglang.interfaces import Comm, DirectEngine
from megatron_sglang.layout import samples_of
from megatron_sglang.sync import BroadcastPath, DirectPath, GenericPath
from megatron_sglang.sync import Path as SyncPath
from megatron_sglang.sync_methods import AdapterPath, DiskPath, MergeOnEnginePath, RestartPath
from megatron_sglang.sync_plan import Plans, plan_for
from megatron_sglang.transfer import BUFFERS
from megatron_sglang.weights import shards
from megatron_sglang.weights.adapters import AdapterStream
from megatron_sglang.weights.direct import DirectSender
from megatron_sglang.weights.disk import DiskWriter, FolderHome
from megatron_sglang.weights.export import MergedWeights


@dataclass(frozen=True, slots=True)
class Paths:
    """Makes paths for one model and its engine, or its group of engines. Every rank makes the same calls.

    shapes: HF name -> shape of every tensor; None: unknown, so that only the generic path can be had, unchecked.
    engine: on the leader only. engine_ranks: of all engines together. hosts: trainer ranks on the engines' node, the
    first ones, which hand over to them; None: all.
    The rest is for the methods beside generic and direct. hf_path: the base model's folder. home: where versions are
    written, e.g. RUN/weights, seen by all ranks and engines. on_disk: hf_path holds the base weights too.
    """

    comm: Comm
    bridge: Any
    model_chunks: list[Any]
    dtype: torch.dtype
    bucket_bytes: int
    shapes: Mapping[str, tuple[int, ...]] | None
    engine: DirectEngine | None
    engine_ranks: int
    hosts: int | None = None
    hf_path: str = ""
    home: str = ""
    lora: LoraConfig | None = None
    on_disk: bool = True
    say: Callable[[str], None] = lambda _: None
    plans: Plans = field(default_factory=Plans)
    buffers: int = BUFFERS
    """Receive buffers of the direct path."""

    def of(self, method: str) -> tuple[SyncPath | None, Callable[[], DirectPath] | None]:
        """For `cycle.Cycle`: the path of `sync.method`, and what makes the direct one, tried after it or used alone."""
        if method == "auto":
            return self.generic(), self.direct if self.shapes is not None else None
        if method == "direct":
            self._known_shapes(method)
            return None, self._direct_alone
        made = {
            "generic": self.generic,
            "broadcast": self.broadcast,
            "disk": self.disk,
            "restart": self.restart,
            "adapter": self.adapter,
            "merge-on-engine": self.merge_on_engine,
        }
        if method not in made:
            raise ConfigError(
                f"sync.method={method} is not made here; expected auto, direct or one of {', '.join(made)}"
            )
        return made[method](), None

    def generic(self) -> GenericPath:
        return GenericPath(self.comm, self._weights(), self.engine)

    def broadcast(self) -> BroadcastPath:
        """Buckets through a process group of the leader and all engine ranks; to engines without our loader by SGLang's
        own routes (`engine/external.py`)."""
        engine: Any = self.engine
        link = engine if engine is None or engine.unproved else Broadcast(engine)
        return BroadcastPath(self.comm, self._weights(), link)

    def disk(self) -> DiskPath:
        return DiskPath(self.comm, self._writer(), self.engine, self._calls)

    def restart(self) -> RestartPath:
        return RestartPath(self.comm, self._writer(), self.engine, self._calls)

    def merge_on_engine(self) -> MergeOnEnginePath:
        """`ConfigError` where the shapes of the HF tensors are not known."""
        shapes = self._known_shapes("merge-on-engine")
        base = GenericPath(self.comm, self._weights(merge=False), self.engine)
        return MergeOnEnginePath(
            self.comm,
            self._adapters(),
            base,
            self.generic(),
            self.engine,
            self._calls,
            shapes=shapes,
            dtype=self._dtype_name,
            exact=not torch.cuda.is_initialized(),
            say=self.say,
        )

    def adapter(self) -> AdapterPath:
        """The engine must have been started with `lora_options.lora_server_args`, on hf_path where it holds weights."""
        base = None if self.on_disk else self._writer(merge=False, name="base")
        return AdapterPath(self.comm, self._adapters(), self.engine, self._calls, home=self.hf_path, base=base)

    def _direct_alone(self) -> DirectPath:
        """Without a generic path to compare with: first what the plan is made from is tested, on drawn values."""
        self.comm.from_leader(self._self_test)
        return self.direct()

    def _self_test(self) -> None:
        assert self.engine is not None, "only the leader talks to the engine"
        shapes, device = self._known_shapes("direct"), next(self.model_chunks[0].parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        for names in samples_of(shapes):
            drawn = {name: torch.randn(shapes[name], generator=generator, device=device) for name in names}
            self.engine.self_test({name: tensor.to(self.dtype) for name, tensor in drawn.items()})

    def _known_shapes(self, method: str) -> Mapping[str, tuple[int, ...]]:
        if self.shapes is None:
            raise ConfigError(
                f"sync.method={method} needs the names and shapes of all weights, which neither a folder with weights "
                "nor transformers gives for this model; use sync.method=generic"
            )
        return self.shapes

    def _weights(self, *, merge: bool = True) -> MergedWeights:
        chunks, limit = self.model_chunks, self.bucket_bytes
        return MergedWeights(self.bridge, chunks, limit, self.dtype, self.shapes, merge=merge)

    def _writer(self, *, merge: bool = True, name: str = "v{version:06}") -> DiskWriter:
        home, source = Path(self.home), Path(self.hf_path)
        return DiskWriter(self.comm, self._weights(merge=merge), home, source, self._dtype_name, name=name)

    def _adapters(self) -> AdapterStream:
        assert self.lora is not None, "the methods that send adapters need their options"
        return AdapterStream(
            self.bridge,
            self.model_chunks,
            self.comm,
            self.lora,
            dtype=self.dtype,
            bucket_bytes=self.bucket_bytes,
            home=FolderHome(Path(self.home), "policy-v"),
            base=self.hf_path,
        )

    @property
    def _calls(self) -> MethodCalls | None:
        engine: Any = self.engine
        return MethodCalls(engine) if engine is not None else None

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def direct(self) -> DirectPath:
        """Makes the plan and installs it in the engine; `WeightSyncError` on all ranks where there is none."""
        shapes = self.shapes or {}
        plan = plan_for(
            self.comm,
            self.engine,
            self.engine_ranks,
            shapes,
            lambda: shards.of_this_rank(self.bridge, self.model_chunks, shapes),
            self.bucket_bytes // self.dtype.itemsize,
            self.hosts,
            self.plans,
        )
        sender = DirectSender(self.bridge, self.model_chunks, plan, self.dtype, shapes, self.hosts, self.buffers)
        return DirectPath(self.comm, sender, self.engine, self.engine_ranks, open_line, self.hosts)
