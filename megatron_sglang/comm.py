"""How ranks act as one: a value from the leader, a value from each, an error for all. JSON over gloo, no pickle.

One failure, one way to die: whatever one rank raises inside `from_leader` or hands to `agree` is raised on every
rank, as the same class with the same message, so that no rank is left waiting in a collective.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_sglang.errors import MegatronSglangError, from_text


class TorchComm:
    """`interfaces.Comm` over torch.distributed. Makes a gloo group of its own, so every rank must construct it.

    timeout_s: how long a rank waits for the others, the leader's work (a whole rollout) included.
    """

    def __init__(self, timeout_s: float = 3600.0) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def from_leader(self, produce: Callable[[], Any]) -> Any:
        """Run `produce` on rank 0 and give its JSON-able value to all; its error is raised on all ranks."""
        reply: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                reply = {"value": produce()}
            except BaseException as error:  # noqa: BLE001 - not swallowed: sent to all ranks and raised there
                failure, reply = error, {"error": _describe(error)}
        reply = self._broadcast(reply)
        if failure is not None:
            raise failure
        if "error" in reply:
            raise from_text(*reply["error"])
        return reply["value"]

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error; the lowest such rank's, with its number in the message."""
        errors = self.gather(_describe(error) if error is not None else None)
        for rank, found in enumerate(errors):
            if found is None:
                continue
            if rank == self.rank and error is not None:
                raise error
            kind, message = found
            raise from_text(kind, f"rank {rank}: {message}")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank, on every rank."""
        mine = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(mine, (0, longest - mine.numel()))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [_decode(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def _broadcast(self, value: Any) -> Any:
        data = _encode(value) if self.rank == 0 else torch.zeros(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, 0, group=self._group)
        if self.rank != 0:
            data = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return _decode(data)


def _describe(error: BaseException) -> tuple[str, str]:
    if isinstance(error, MegatronSglangError):
        return type(error).__name__, str(error)
    return "MegatronSglangError", f"{type(error).__name__}: {error}"


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()).decode())
