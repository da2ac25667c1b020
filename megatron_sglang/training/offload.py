"""The trainer's memory on its device given back for a while: parameters, buffers, gradients, optimizer state.

What moves are storages, not tensors: every tensor, view and parameter stays the object it was, with the same elements
afterwards; while they are away their storages have no bytes (`UntypedStorage.resize_`, as Megatron's own
`offload_grad_buffers` does it). Megatron's helpers are not used: `optimizer.offload_to_cpu` gives the optimizer's
parameters other storages (core/optimizer/optimizer.py:567), so that they are views of DDP's buffers no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Offload:
    """Of one rank. model_chunks: as Megatron's train step gets them; optimizer: Megatron's."""

    def __init__(self, model_chunks: list[Any], optimizer: Any) -> None:
        self.model_chunks, self.optimizer = model_chunks, optimizer
        self._shelf: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        """Storage and a host copy of its bytes, of those that are away."""
        self._rooms: dict[tuple[int, int], torch.Tensor] = {}
        """Pinned host memory of GPU storages, kept for the next time: pinning is slow."""

    @property
    def is_out(self) -> bool:
        return bool(self._shelf)

    @property
    def bytes_away(self) -> int:
        return sum(room.numel() for _, room in self._shelf.values())

    @torch.no_grad()
    def out(self) -> int:
        """Move everything to the host and give the device's memory back; bytes moved."""
        assert not self._shelf, "the trainer's memory is away already"
        for number, storage in enumerate(self._storages()):
            bytes_of = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            room = self._room(number, bytes_of)
            room.copy_(bytes_of)
            self._shelf[storage._cdata] = storage, room
        for storage, _ in self._shelf.values():
            storage.resize_(0)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return self.bytes_away

    @torch.no_grad()
    def back(self) -> None:
        """Undo `out`."""
        for storage, room in self._shelf.values():
            assert not storage.nbytes(), "somebody used the trainer's memory while it was away"
            storage.resize_(room.numel())
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(room)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._shelf.clear()

    def _room(self, number: int, like: torch.Tensor) -> torch.Tensor:
        if not like.is_cuda:
            return torch.empty(like.numel(), dtype=torch.uint8)
        key = number, like.numel()
        if key not in self._rooms:
            self._rooms[key] = torch.empty(like.numel(), dtype=torch.uint8, pin_memory=True)
        return self._rooms[key]

    def _storages(self) -> list[torch.UntypedStorage]:
        """Each once, in the same order every time."""
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found.setdefault(storage._cdata, storage)
        return list(found.values())

    def _tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self.model_chunks:
            # Megatron's DDP calls its own buffers `buffers`, in place of the module's method.
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield from (data for data in (buffer.param_data, buffer.grad_data) if data is not None)
            yield from _of(chunk.module.parameters())
            yield from chunk.module.buffers()
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        for inner in (part.optimizer for part in parts if part.optimizer is not None):
            for group in inner.param_groups:
                yield from _of(group["params"])
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _of(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for parameter in parameters:
        yield parameter.data
        if parameter.grad is not None:
            yield parameter.grad
