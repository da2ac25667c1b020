"""What travels to `loader.py` and back: envelopes, payloads and the mailbox.

An envelope is JSON {"id", "rank", "command", "version", ...}; a payload is SGLang's serialised [(envelope, tensor)]
for one tensor-parallel rank: the bytes themselves on a CPU, a CUDA IPC handle on a GPU. An answer is one JSON file of
each rank, compressed when it is large.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from megatron_sglang.errors import WeightSyncError

_DEVICE_INDEX = 6
"""Position of the device number in torch's arguments for rebuilding a CUDA tensor (sglang utils/patch_torch.py:75)."""


_LARGE = 1 << 16
"""Bytes of an answer from which on it is compressed."""


class LineCutError(WeightSyncError):
    """All that engine ranks report is that the trainer has left (`line.CutError`): the reason is the trainer's."""


def serialize(envelope: Mapping[str, Any], data: torch.Tensor) -> str:
    """One rank's payload, base64. Call it once per rank: a CUDA IPC handle may be opened once only."""
    return pickled([(json.dumps(envelope), data)], by_handle=data.is_cuda)


def pickled(value: Any, *, by_handle: bool) -> str:
    """What SGLang unpickles, base64. Flat uint8 tensors in it go by value, or as CUDA IPC handles."""
    buffer = io.BytesIO()
    (_IpcPickler if by_handle else _ByValuePickler)(buffer).dump(value)
    return base64.b64encode(buffer.getvalue()).decode()


def serialize_alike(
    message: Mapping[str, Any],
    ranks: int,
    data: torch.Tensor | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """One payload for each rank with the same message and data (None: no bytes). each: more of the message, by rank."""
    data = torch.empty(0, dtype=torch.uint8) if data is None else data
    extra = each or [{}] * ranks
    return [serialize({"rank": rank, **message, **extra[rank]}, data) for rank in range(ranks)]


class _ByValuePickler(pickle.Pickler):
    """Pickles a flat uint8 CPU tensor as its bytes.

    Torch's way of sharing CPU memory passes file descriptors, which kills SGLang; its way of pickling by value names
    `torch.storage._load_from_bytes`, which importing Megatron replaces (core/safe_globals.py) by a function that SGLang
    refuses to load.
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if not obj.numel():
            return functools.partial(torch.zeros, 0, dtype=torch.uint8), ()
        return functools.partial(torch.frombuffer, dtype=torch.uint8), (bytearray(obj.numpy()),)


class _IpcPickler(ForkingPickler):
    """Pickles CUDA tensors as IPC handles with the device's UUID, which SGLang maps back to its own numbering."""

    def reducer_override(self, obj: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not (isinstance(obj, torch.Tensor) and obj.is_cuda):
            return NotImplemented
        from torch.multiprocessing.reductions import reduce_tensor

        reduced: Any = reduce_tensor(obj)
        rebuild, arguments = reduced
        index = arguments[_DEVICE_INDEX]
        uuid = str(torch.cuda.get_device_properties(index).uuid) if isinstance(index, int) else index
        return rebuild, (*arguments[:_DEVICE_INDEX], uuid, *arguments[_DEVICE_INDEX + 1 :])


def collect_ipc() -> None:
    """Give back CUDA memory of buckets that the engine ranks have closed; torch would only do so when it runs short."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.ipc_collect()


def reply_name(identity: int, rank: int) -> str:
    """File of a rank's answer, in the mailbox."""
    return f"{identity}.{rank}.json"


def write_reply(path: Path, reply: Mapping[str, Any]) -> None:
    """Called in the rank: the whole answer appears at once."""
    content = json.dumps(reply).encode()
    partial = path.with_suffix(".partial")
    partial.write_bytes(zlib.compress(content) if len(content) > _LARGE else content)
    partial.replace(path)


def _read_reply(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    path.unlink()
    return json.loads(content if content.startswith(b"{") else zlib.decompress(content))


def collect(mailbox: Path, message_id: int, ranks: int, what: str) -> list[dict[str, Any]]:
    """Take every rank's answer out of the mailbox; `WeightSyncError` naming `what` and the first rank that failed.

    Ranks whose line was cut come last: they fail because another one did (or because the trainer gave up).
    """
    replies = []
    for rank in range(ranks):
        path = mailbox / reply_name(message_id, rank)
        if not path.exists():
            raise WeightSyncError(f"{what}, engine rank {rank}: no answer from the loader; see the engine's log")
        replies.append(_read_reply(path))
    failed = [(reply.get("cut", False), rank, reply["error"]) for rank, reply in enumerate(replies) if not reply["ok"]]
    if failed:
        cut, rank, error = min(failed)
        raise (LineCutError if cut else WeightSyncError)(f"{what}, engine rank {rank}: {error}")
    return replies


def engine_digest(replies: Sequence[Mapping[str, Any]]) -> str:
    """Hex digest of all ranks' parameters, independent of how they were cut into buckets."""
    digests = [sorted(reply["digests"].items()) for reply in replies]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
