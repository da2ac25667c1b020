"""The direct path's line: a Unix socket between a trainer rank and the engine rank beside it. Torch only.

    frame   ">IQ" (header length, body length), header as JSON, body
    there   {"index", "version", "lengths", "digests", "dtype", "buffer", "bytes"}: a delivery; the body is its bytes,
            or empty where the header's "handle" gives the buffer's memory (CUDA IPC, once for each and version)
            {"end": number of deliveries}: these were all
    back    {"index", "error"}: delivery `index` is in the parameters, and its buffer may be written again

The trainer listens in the engine's private mailbox folder, the engine rank connects: one SGLang message starts it, and
no further one is needed until the version is proved. No pickle: a handle is the JSON of torch's own numbers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from megatron_sglang.engine.wire import reply_name
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.unix_socket import short_name

_PREFIX = struct.Struct(">IQ")
_POLL_S = 0.1


class LineError(ConnectionError):
    """The other side is gone, silent or late."""


class CutError(ValueError):
    """Raised in an engine rank whose trainer rank left before the end. The reason is another rank's error; this one is
    only a consequence, and reported last (`wire.collect`)."""


class End:
    """One end of a connected line. Raises `LineError`.

    timeout_s: for all that is sent and received on it together. is_over: asked ten times a second while waiting; True
    if waiting is in vain.
    """

    def __init__(self, connection: socket.socket, timeout_s: float, is_over: Callable[[], bool]) -> None:
        self._socket, self._is_over, self._timeout_s = connection, is_over, timeout_s
        self._deadline = time.monotonic() + timeout_s
        connection.settimeout(_POLL_S)

    def send(self, header: Mapping[str, Any], body: memoryview | bytes = b"") -> None:
        text = json.dumps(header).encode()
        self._all(_PREFIX.pack(len(text), len(body)) + text, self._socket.send)
        self._all(body, self._socket.send)

    def receive(self, room: Callable[[int], memoryview] | None = None) -> tuple[dict[str, Any], memoryview]:
        """The next frame, as (header, body). room: gives memory for a body of so many bytes; None: it gets its own."""
        header_bytes, body_bytes = _PREFIX.unpack(self._exactly(bytearray(_PREFIX.size)))
        header = json.loads(bytes(self._exactly(bytearray(header_bytes))))
        return header, self._exactly(room(body_bytes) if room is not None and body_bytes else bytearray(body_bytes))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, room: bytearray | memoryview) -> memoryview:
        self._all(room, self._socket.recv_into)
        return memoryview(room)

    def _all(self, data: memoryview | bytes | bytearray, step: Callable[[memoryview], int]) -> None:
        """Repeat `step` (send, recv_into), which does a part each time, until `data` is done."""
        left = memoryview(data).cast("B")
        while left:
            try:
                done = step(left)
            except TimeoutError:
                self._check()
                continue
            except OSError as error:
                raise LineError(f"the other side is gone ({error})") from error
            if not done:
                raise LineError("the other side hung up")
            left = left[done:]

    def _check(self) -> None:
        if self._is_over():
            raise LineError("the other side has ended")
        if time.monotonic() > self._deadline:
            raise LineError(f"no sign of life from the other side within {self._timeout_s:g} s")


# ---- the trainer's end ----


def open_line(call: Mapping[str, Any], rank: int) -> Line:
    """The trainer's end of the line to engine rank `rank`, counted through all engines if there are several
    (`group.EngineGroup.open_stream`)."""
    if "engines" not in call:
        return Line(call, rank)
    engine, within = divmod(rank, call["ranks_each"])
    return Line(call["engines"][engine], within)


class Line:
    """A trainer rank's end of the line to the engine rank beside it, number `rank` of its engine; for one weight
    version.

    call: what `open_stream` of that engine gave to all ranks. Listens at once; the engine rank connects when the leader
    has started the stream. Raises `WeightSyncError` that names version, delivery and engine rank.
    """

    def __init__(self, call: Mapping[str, Any], rank: int) -> None:
        self._version, self._rank, self._timeout_s = call["version"], rank, call["timeout_s"]
        self._engine = call.get("engine", "")
        ends = ended_name(call["id"]), reply_name(call["id"], rank)
        self._ending_files = [Path(call["folder"], name) for name in ends]
        self._end: End | None = None
        self._sent = self._answered = 0
        self._lent: dict[int, dict[str, Any]] = {}
        """Number of a buffer -> handle that was given out. Emptied when the engine rank, which gives them back itself,
        has ended well."""
        self._listener = socket.socket(socket.AF_UNIX)
        with short_name(Path(call["folder"], socket_name(call["id"], rank))) as path:
            self._listener.bind(path)
        self._path = Path(call["folder"], socket_name(call["id"], rank))
        self._listener.listen(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            self._end.close()
        for handle in self._lent.values():
            take_back(handle)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def send(self, header: Mapping[str, Any], buffer: int, memory: torch.Tensor, data: torch.Tensor) -> None:
        """Hand over the next delivery: flat `data`, the beginning of the flat buffer `memory` that has this number for
        the whole version. Its bytes must be complete on their device now, and stay until `wait`.

        header: "index", "lengths", "digests", "dtype" (see `direct.deliver`).
        """
        flat = data.view(torch.uint8)
        whole = {"version": self._version, **header, "buffer": buffer, "bytes": flat.numel()}
        with self._naming(self._sent):
            if self._end is None:
                self._end = self._accept()
            if not data.is_cuda:
                self._end.send(whole, memoryview(flat.numpy()))
            elif buffer in self._lent:
                self._end.send(whole)
            else:
                self._lent[buffer] = handle_of(memory.view(torch.uint8))
                self._end.send({**whole, "handle": self._lent[buffer]})
        self._sent += 1

    def wait(self, index: int) -> None:
        """Return when delivery `index` is in the engine's parameters, so that its memory may be written again."""
        while self._answered <= index:
            with self._naming(self._answered):
                assert self._end is not None, f"delivery {index} was never sent"
                self._take(self._end.receive()[0])

    def finish(self) -> None:
        """Return when all deliveries are in the parameters, and tell the engine rank that these were all."""
        if self._sent:
            self.wait(self._sent - 1)
            assert self._end is not None
            with self._naming(self._sent):
                self._end.send({"end": self._sent})
            self._lent.clear()  # it gives them back itself

    def _take(self, answer: Mapping[str, Any]) -> None:
        if answer["error"]:
            raise LineError(answer["error"])
        self._answered += 1

    def _accept(self) -> End:
        deadline = time.monotonic() + self._timeout_s
        self._listener.settimeout(_POLL_S)
        while True:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                return End(connection, self._timeout_s, self._is_over)
            if self._is_over() or time.monotonic() > deadline:
                raise LineError("it never connected")

    def _is_over(self) -> bool:
        """Has the engine rank, or the whole engine, answered SGLang's message, so that nothing more will come?"""
        return any(file.exists() for file in self._ending_files)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Turn a broken line into a `WeightSyncError` that says where, and why if the engine rank has told."""
        try:
            yield
        except LineError as error:
            # A rank that refuses a delivery says why before it hangs up.
            reason = self._last_words() or str(error)
            raise WeightSyncError(
                f"{self._engine}weight version {self._version}, stream after {index} deliveries, "
                f"engine rank {self._rank}: {reason}"
            ) from error

    def _last_words(self) -> str:
        with contextlib.suppress(LineError, ValueError):
            while self._end is not None:
                answer = self._end.receive()[0]
                if answer["error"]:
                    return answer["error"]
        return ""


# ---- the engine rank's end ----


def receive(
    call: Mapping[str, Any],
    device: torch.device,
    expected: int,
    handle: Callable[[dict[str, Any], torch.Tensor], None],
) -> None:
    """Take deliveries until the trainer says that these were all. handle: writes one, given its header and flat bytes.

    Raises what `handle` raises, after telling the trainer. Raises `CutError` if the trainer is gone before the end, or
    ends after another number of deliveries than `expected`: both happen when another trainer rank has failed.
    """
    buffers: dict[int, torch.Tensor] = {}
    connection = socket.socket(socket.AF_UNIX)
    with connection, short_name(Path(call["folder"], socket_name(call["id"], call["rank"]))) as path:
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            # It listened before the stream was started, and has left since: another rank failed.
            raise CutError("the trainer hung up before this rank came") from error
        end = End(connection, call["timeout_s"], lambda: False)
        taken, room = 0, _Room()
        try:
            while True:
                header, _ = end.receive(room)
                if "end" in header:
                    if taken != expected:
                        raise CutError(f"the trainer ended after {taken} deliveries, expected {expected} by plan")
                    return
                if "handle" in header:
                    buffers[header["buffer"]] = open_handle(header["handle"])
                memory = buffers.get(header["buffer"], room.memory)[: header["bytes"]]
                try:
                    # From another GPU of the node one copy; from the CPU (and on it) `handle` takes it from there.
                    handle(header, memory.to(device) if memory.is_cuda else memory)
                except Exception as error:
                    with contextlib.suppress(LineError):  # a trainer that has left hears of it by the message's answer
                        end.send({"index": header["index"], "error": str(error)})
                    raise
                end.send({"index": header["index"], "error": ""})
                taken += 1
        except LineError as error:
            raise CutError(f"after {taken} deliveries: the trainer's line broke: {error}") from error


class _Room:
    """Memory for the bodies of frames, one at a time."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, size: int) -> memoryview:
        if size > self.memory.numel():
            self.memory = torch.empty(size, dtype=torch.uint8)
        return memoryview(self.memory.numpy())[:size]


# ---- names, and memory of another process ----


def socket_name(identity: int, rank: int) -> str:
    return f"{identity}.{rank}.line"


def ended_name(identity: int) -> str:
    """File that appears when the engine has answered the stream's message, well or not."""
    return f"{identity}.ended"


_BYTES = ("storage_handle", "ref_counter_handle", "event_handle")
_FIELDS = (
    "storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle",
    "ref_counter_offset", "event_handle", "event_sync_required",
)  # fmt: skip
"""What torch's `rebuild_cuda_tensor` wants after class, geometry and device (torch/multiprocessing/reductions.py)."""


def handle_of(flat: torch.Tensor) -> dict[str, Any]:
    """CUDA IPC handle of a flat uint8 tensor, to be opened once, as JSON values. The device is named by its UUID."""
    from torch.multiprocessing.reductions import reduce_tensor

    reduced: Any = reduce_tensor(flat)
    _, (_, (size,), _, offset, _, _, device, *rest) = reduced
    found = dict(zip(_FIELDS, rest, strict=True))
    found |= {name: base64.b64encode(found[name]).decode() for name in _BYTES}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return {"size": size, "offset": offset, "device": uuid, **found}


def take_back(handle: Mapping[str, Any]) -> None:
    """Free memory that was lent to a process which may have died: torch keeps it as long as a counter of borrowers,
    which that process would have lowered, is above 0."""
    counter = base64.b64decode(handle["ref_counter_handle"])
    torch.UntypedStorage._release_ipc_counter_cuda(counter, handle["ref_counter_offset"])  # type: ignore[attr-defined]


def open_handle(handle: Mapping[str, Any]) -> torch.Tensor:
    """The tensor of another process, as a view of its memory. ValueError if no GPU that is visible here has it."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    visible = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if handle["device"] not in visible:
        raise ValueError(f"the trainer's memory is on GPU {handle['device']}, which this engine rank cannot see")
    rest = [base64.b64decode(handle[name]) if name in _BYTES else handle[name] for name in _FIELDS]
    size = torch.Size([handle["size"]])
    storage, dtype, index = torch.storage.TypedStorage, torch.uint8, visible.index(handle["device"])
    # By position: SGLang puts a function without names in its place (utils/patch_torch.py:81).
    return rebuild_cuda_tensor(torch.Tensor, size, (1,), handle["offset"], storage, dtype, index, *rest)
