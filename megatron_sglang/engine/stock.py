"""Weights by SGLang's own routes, for engines without our loader.

    begin     (pause and flush, as ever)
    load      /init_weights_update_group once, then /update_weights_from_distributed for each bucket: whole tensors
              by gloo from the leader to each rank, which gives it to `model.load_weights`
    commit    checks that all buckets went out; sends the embedding as the head where none came; /weights_checker

The head: SGLang's MoE models ignore tie_word_embeddings (models/qwen3_moe.py:958) and would keep that of the version
before. Models that do tie theirs pass over it.

SGLang says whether a message failed. What it does not say, and so nobody knows: whether bytes changed on their way,
whether a tensor was left out or dropped by the model's loader, whether a parameter was filled.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_sglang.buckets import Bucket
from megatron_sglang.engine.background import in_thread
from megatron_sglang.engine.http import Http
from megatron_sglang.engine.live_model import EMBEDDING, HEAD
from megatron_sglang.engine.options import EngineOptions
from megatron_sglang.engine.process_group import Group, GroupError
from megatron_sglang.errors import EngineError, EngineTimeoutError, WeightSyncError
from megatron_sglang.store import open_store

GROUP = "megatron_sglang"
NOT_OFFERED = "not proved"
"""What stands in place of a digest."""


class StockUpdate:
    """The weight updates of one engine: `begin`, then `load` for each bucket or `read` once, then `commit`. host: that
    of the engine's URL."""

    def __init__(self, http: Http, options: EngineOptions, host: str) -> None:
        self._http, self._options, self._host = http, options, host
        self._timeout_s = options.update_timeout_s
        self._group: Group | None = None
        self._name = ""
        """Name of the group. Always a new one, because SGLang forgets no group, not even one that broke or whose
        trainer has ended."""
        self._buckets = 0
        self._embedding: torch.Tensor | None = None
        """The version's embedding, to be sent as its head if none comes (module's docstring)."""
        self._has_head = False

    def begin(self) -> None:
        """After requests were ended and caches emptied."""
        self._buckets = 0
        self._embedding, self._has_head = None, False

    def load(self, bucket: Bucket) -> None:
        """Send the next bucket; SGLang has loaded it when this returns."""
        if bucket.index != self._buckets:
            raise WeightSyncError(f"got bucket {bucket.index}, expected {self._buckets}")
        named = dict(bucket.tensors())
        self._give(named)
        self._has_head |= HEAD in named
        if EMBEDDING in named:
            self._embedding = named[EMBEDDING].clone()  # the bucket's memory is used again
        self._buckets += 1

    def commit(self, buckets: int) -> None:
        """`WeightSyncError` unless all buckets went out; sends the head where it follows from the embedding."""
        if buckets != self._buckets:
            raise WeightSyncError(f"{buckets} buckets were to be sent, {self._buckets} were")
        if self._embedding is not None and not self._has_head:
            self._give({HEAD: self._embedding})
        self._embedding = None

    def read(self, folder: Path) -> None:
        """Let SGLang load a whole HF folder by its own reader, which it can even if it was started with random weights.

        It reports names that it does not know, but not names that are missing.
        """
        body = {"model_path": str(folder), "load_format": "auto", "flush_cache": False}
        self._http.post("/update_weights_from_disk", body, self._timeout_s)
        for path in folder.glob("*.safetensors"):
            self._buckets += 1
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                self._has_head |= HEAD in names
                if EMBEDDING in names:
                    self._embedding = file.get_tensor(EMBEDDING).to(getattr(torch, self._options.dtype))

    def close(self) -> None:
        """Leave the group; ranks that wait in it are cut."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _give(self, named: Mapping[str, torch.Tensor]) -> None:
        if self._group is None:
            self._join()
        body = {
            "names": list(named),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in named.values()],
            "shapes": [list(tensor.shape) for tensor in named.values()],
            "group_name": self._name,
            "flush_cache": False,
        }
        answer = self._ask("/update_weights_from_distributed", body)
        self._meanwhile(answer, lambda: self._send(list(named.values()), answer))

    def _join(self) -> None:
        self._name = f"{GROUP}-{secrets.token_hex(8)}"
        address = own_address(self._host)
        store, port = open_store(address, self._timeout_s)
        size = 1 + self._options.tp_size
        body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
        answer = self._ask("/init_weights_update_group", {**body, "group_name": self._name, "backend": "gloo"})

        def join() -> None:
            # As torch's and SGLang's functions put names before the keys (sglang utils/common.py:2493, torch
            # distributed_c10d.py: _new_process_group_helper); a server test compares.
            where: Any = store
            for prefix in (self._name, f"{self._name}/", "cpu/"):
                where = dist.PrefixStore(prefix, where)
            self._group = Group(where, 0, size, "gloo", self._timeout_s, address)

        self._meanwhile(answer, join)

    def _send(self, tensors: list[torch.Tensor], answer: concurrent.futures.Future[Any]) -> None:
        assert self._group is not None
        for tensor in tensors:
            self._group.broadcast(tensor, lambda: answer.done() and answer.exception() is not None)

    def _ask(self, path: str, body: dict[str, Any]) -> concurrent.futures.Future[Any]:
        return in_thread(lambda: self._http.post(path, body, self._timeout_s))

    def _meanwhile(self, answer: concurrent.futures.Future[Any], work: Callable[[], None]) -> None:
        """Do our part of what the engine does; its error, which knows more, comes before ours."""
        failure = None
        try:
            work()
        except GroupError as error:
            self.close()
            failure = error
        try:
            answer.result(self._timeout_s)
        except concurrent.futures.TimeoutError:
            self.close()
            raise EngineTimeoutError(f"no answer within {self._timeout_s:g} s; see the engine's log") from failure
        except EngineError:
            self.close()
            raise
        if failure is not None:
            raise WeightSyncError(f"broadcast: {failure}; see the engine's log") from failure


def checksum(http: Http, timeout_s: float) -> str:
    """Checksum of all parameters of all ranks, by /weights_checker; `NOT_OFFERED` without it. Depends on the layout."""
    try:
        found = http.post("/weights_checker", {"action": "checksum"}, timeout_s)
    except EngineError:
        return NOT_OFFERED
    return str(found.get("per_engine_checksum") or NOT_OFFERED)


def own_address(host: str) -> str:
    """Ours as `host` sees it: the store and the group's connections listen there and nowhere else."""
    if host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; it makes the kernel choose a way
        return probe.getsockname()[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
