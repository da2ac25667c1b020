"""How ranks act as one: a value from the leader, a value from each, an error for all. JSON over gloo, no pickle;
what is large goes as bytes.

One failure, one way to die: whatever one rank raises inside `from_leader` or hands to `agree` is raised on every
rank, as the same class with the same message, so that no rank is left waiting in a collective (`TorchComm`). An error
that comes anywhere else is posted on a `Board`, where the ranks that fail as a consequence find the cause.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_sglang.errors import (
    MegatronSglangError,
    OnOtherRank,
    SetupError,
    Stopped,
    StoppedError,
    from_text,
    is_from_other_rank,
)

STORE_TIMEOUT_S = 10.0
"""For one question to the rendezvous' store, which answers at once if it is there."""


class TorchComm:
    """`interfaces.Comm` over torch.distributed. Makes a gloo group of its own, so every rank must construct it.

    timeout_s: how long a rank waits for the others, the leader's work (a whole rollout) included.
    """

    def __init__(self, timeout_s: float = 3600.0) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def from_leader(self, produce: Callable[[], Any]) -> Any:
        """Run `produce` on rank 0 and give its JSON-able value to all; its error is raised on all ranks."""
        data = None
        if self.rank == 0:
            try:
                data = _encode({"value": produce()})  # inside, because a value that is no JSON is an error for all, too
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # ranks that are gone need no word
                    self._broadcast(_encode({"error": _describe(error)}))
                raise
        reply = self._broadcast(data)
        if "error" in reply:
            raise _of_rank(0, *reply["error"])
        return reply["value"]

    def bytes_from_leader(self, parts: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
        """Give rank 0's `parts` to every rank. sizes: of each in bytes, which every rank must know already. They go one
        at a time, so that no rank needs room for all of them twice."""
        if self.rank == 0:
            assert [len(part) for part in parts] == list(sizes), "the ranks were told other sizes"
        found = []
        for number, size in enumerate(sizes):
            data = bytearray(parts[number] if self.rank == 0 else size)
            if size:
                dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0, group=self._group)
            found.append(parts[number] if self.rank == 0 else bytes(data))
        return found

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error: that of the lowest such rank, which the message names."""
        errors = self.gather(_describe(error) if error is not None else None)
        for rank, found in enumerate(errors):
            if found is None:
                continue
            if rank == self.rank and error is not None:
                raise error
            kind, message = found
            raise _of_rank(rank, kind, f"rank {rank}: {message}")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank, on every rank."""
        mine = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)  # all_gather takes equal shapes only
        padded = torch.nn.functional.pad(mine, (0, longest - mine.numel()))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [_decode(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def _broadcast(self, data: torch.Tensor | None) -> Any:
        """What rank 0 has encoded in `data`, decoded on every rank; None on the others."""
        size = torch.tensor([data.numel() if data is not None else 0])
        dist.broadcast(size, 0, group=self._group)
        if data is None:
            data = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return _decode(data)


class Board:
    """Where ranks meet before process groups exist, and where the first error is posted when ranks fail.

    Two keys in the store of torchrun's rendezvous: "arrived", a count, and "failure", [rank, class, message] of the
    rank that failed first. The store lives as long as torchrun does, or without torchrun as rank 0. Every rank must
    construct a board. Raises `SetupError` where there is no rendezvous.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        environment = os.environ
        if "MASTER_ADDR" not in environment or "RANK" not in environment:
            raise SetupError(
                "RANK and MASTER_ADDR are not set; expected to be one of torchrun's ranks: "
                "start with `torchrun --nproc-per-node N pretrain_gspo.py ...`"
            )
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        try:
            store = dist.TCPStore(
                address,
                port,
                self.world_size,
                is_master=self.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SetupError(
                f"rank {self.rank} cannot meet the others at {address}:{port}: {reason}; "
                "if something else has that port, choose another with --master-port"
            ) from error
        store.set_timeout(datetime.timedelta(seconds=STORE_TIMEOUT_S))
        # torchrun keeps the store when it starts ranks again (--max-restarts).
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"megatron_sglang/{attempt}", store)

    def meet(self, timeout_s: float = 1800.0) -> None:
        """Wait until every rank is here. Raises the error of one that cannot come, `SetupError` at the deadline."""
        deadline = time.monotonic() + timeout_s
        self._store.add("arrived", 1)
        while (arrived := self._store.add("arrived", 0)) < self.world_size:
            if self._store.check(["failure"]):
                raise self._posted()
            if time.monotonic() > deadline:
                raise SetupError(
                    f"{arrived} of {self.world_size} ranks were ready after {timeout_s:g} s; see the other ranks' logs"
                )
            time.sleep(0.1)

    @contextlib.contextmanager
    def one_error(self) -> Iterator[None]:
        """Whatever ranks raise inside, all of them raise the first of these errors, in its class and with its text.

        A rank that is stopped tells the others, which lose it, and notes whether one of them is why it was stopped.
        """
        try:
            yield
        except Stopped as stopped:
            first = self._first(stopped)
            stopped.follows = first is not stopped and not isinstance(first, StoppedError)
            raise
        except Exception as error:
            first = error if is_from_other_rank(error) else self._first(error)
            if first is error:
                raise
            assert first.__cause__ is not None
            first.__cause__.__cause__ = error  # this rank's own error stays in its traceback, as a consequence
            raise first from first.__cause__

    def _first(self, error: BaseException) -> BaseException:
        """`error` if no rank was faster; else that rank's."""
        mine = json.dumps([self.rank, *_describe(error)])
        try:
            # Sets the key if nobody has, and gives what it holds then.
            first = self._store.compare_set("failure", "", mine).decode()
        except RuntimeError:  # the store is gone, and with it any other rank's word
            return error
        return error if first == mine else self._posted()

    def _posted(self) -> MegatronSglangError:
        return _of_rank(*json.loads(self._store.get("failure")))


def _of_rank(rank: int, kind: str, message: str) -> MegatronSglangError:
    """Another rank's error, from what `_describe` said of it; its cause marks it as such (`is_from_other_rank`)."""
    error = from_text(kind, message)
    error.__cause__ = OnOtherRank(f"rank {rank} has it; see its log")
    return error


def _describe(error: BaseException) -> tuple[str, str]:
    """Class and message, as they travel. What is not of our own errors' tree travels as its root."""
    if isinstance(error, MegatronSglangError):
        return type(error).__name__, str(error)
    if isinstance(error, Stopped):
        return StoppedError.__name__, str(error)
    return "MegatronSglangError", f"{type(error).__name__}: {error}"


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()).decode())
