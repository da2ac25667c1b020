"""Broadcast: full tensors from the leader to every rank of all engines at once; for `sync.BroadcastPath`.

    open    loader "join" in every engine rank, where there is no group yet or the last one broke
    load    loader "receive" in every engine rank with the bucket's header, and its bytes through the group; each rank
            checks and loads them as it does those of "load" (digest of each tensor, order, duplicates)

What is proved at commit is the same as by the generic path. A rank that dies ends the broadcast for all: connections
close, the group is given up, and the next version makes a new one.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_sglang.buckets import Bucket
from megatron_sglang.engine import process_group, wire
from megatron_sglang.engine.background import in_thread
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.process_group import Group, GroupError
from megatron_sglang.errors import EngineError, MegatronSglangError, WeightSyncError, from_text
from megatron_sglang.host import CUMEM, SGLANG_CUMEM
from megatron_sglang.store import open_store

LOOPBACK = "127.0.0.1"


class Broadcast:
    """The sending end, on the leader. engine: one engine, or a group of them (`group.py`)."""

    def __init__(self, engine: HttpEngine | EngineGroup, address: str = LOOPBACK) -> None:
        self.engines: Sequence[HttpEngine] = engine.engines if isinstance(engine, EngineGroup) else [engine]
        self._address = address
        self._named = len(self.engines) > 1
        self._group: Group | None = None
        self._members: list[Any] = []
        self._timeout_s = max(one.options.update_timeout_s for one in self.engines)
        self._rank_timeout_s = 0.8 * self._timeout_s
        """Shorter, so that a rank says what it waited for before its engine's answer is given up."""

    def open(self, device: torch.device) -> None:
        """Make sure that the group of all engine ranks exists. device: where buckets are."""
        members = [(one.server, one.server.incarnation) for one in self.engines]
        if self._group is not None and members == self._members:
            return
        self.close()
        backend: process_group.Backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and CUMEM not in os.environ:
            raise WeightSyncError(
                f"joining the broadcast: {CUMEM} is not set here, and SGLang sets it to {SGLANG_CUMEM} in its own "
                f"processes, for which NCCL would wait for ever; export {CUMEM}={SGLANG_CUMEM} before this process and "
                "the engine are started"
            )
        store, port = open_store(self._address, self._rank_timeout_s)
        size = 1 + sum(one.options.tp_size for one in self.engines)
        message = {"address": self._address, "port": port, "size": size, "backend": backend}
        first, each = 1, []
        for one in self.engines:
            ranks = range(first, first + one.options.tp_size)
            each.append([{**message, "timeout_s": self._rank_timeout_s, "group_rank": rank} for rank in ranks])
            first = ranks.stop
        answers = self._ask({"command": "join"}, "joining the broadcast", each)
        try:
            self._group = Group(store, 0, size, backend, self._rank_timeout_s, self._address)
        except GroupError as error:
            self._heard(answers, WeightSyncError(f"joining the broadcast: {error}"))
        self._heard(answers, None)
        self._members = members

    def load(self, bucket: Bucket) -> None:
        """To every engine rank, which has checked and loaded it when this returns. Raises `WeightSyncError`."""
        if bucket.index == 0:
            self.open(bucket.data.device)
        assert self._group is not None, "a version begins with bucket 0"
        message = {"command": "receive", "bucket": bucket.header(), "bytes": bucket.data.numel()}
        answers = self._ask(message, f"weight version {bucket.version}, broadcast of bucket {bucket.index}")
        failure = None
        try:
            # An engine whose answer is there before the bytes are will not take them.
            self._group.broadcast(bucket.data, lambda: any(_failed(answer) for answer in answers))
        except GroupError as error:
            self.close()
            failure = WeightSyncError(
                f"weight version {bucket.version}, broadcast of bucket {bucket.index}: {error}; see the engines' logs"
            )
        self._heard(answers, failure)

    def close(self) -> None:
        """Give the group up; engine ranks that wait in it are cut."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _ask(
        self, message: Mapping[str, Any], what: str, each: Sequence[Sequence[Mapping[str, Any]]] | None = None
    ) -> list[concurrent.futures.Future[Any]]:
        def of(number: int) -> Callable[[], Any]:
            more = each[number] if each is not None else None
            return lambda: self.engines[number].tell(what, dict(message), None, more)

        return [in_thread(of(number)) for number in range(len(self.engines))]

    def _heard(self, answers: Sequence[concurrent.futures.Future[Any]], failure: WeightSyncError | None) -> None:
        """Wait for all. The first reason that is more than a cut line is raised; `failure` if there is none."""
        deadline = time.monotonic() + self._timeout_s
        concurrent.futures.wait(answers, self._timeout_s, concurrent.futures.FIRST_EXCEPTION)
        if failure is not None or any(map(_failed, answers)):
            self.close()
            self._let_go(answers)
        found: list[MegatronSglangError] = []
        for number, answer in enumerate(answers):
            name = f"engine {number}: " if self._named else ""
            try:
                answer.result(max(0.0, deadline - time.monotonic()))
            except MegatronSglangError as error:
                found.append(from_text(type(error).__name__, f"{name}{error}"))
            except concurrent.futures.TimeoutError:
                found.append(EngineError(f"{name}no answer within {self._timeout_s:g} s; see its log"))
        reasons = [error for error in found if not isinstance(error, wire.LineCutError)]
        for error in (*reasons, *([failure] if failure else []), *found):
            raise error if isinstance(error, WeightSyncError) else WeightSyncError(str(error)) from error

    def _let_go(self, answers: Sequence[concurrent.futures.Future[Any]]) -> None:
        """After a failure: engine ranks pass a broadcast on to each other, so one that is not in it makes others wait.
        The ranks of engines that have answered, and so are in none, are told to leave the group. The others are in the
        broadcast: they could not hear, and end when a connection closes."""
        for one, answer in zip(self.engines, answers, strict=True):
            if answer.done() and not one.why_dead():
                in_thread(lambda one=one: one.tell("leaving the broadcast", {"command": "leave"}))


def _failed(answer: concurrent.futures.Future[Any]) -> bool:
    return answer.done() and answer.exception() is not None
