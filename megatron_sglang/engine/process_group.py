"""A process group of trainer and engine ranks for one sender, rank 0, and what engine ranks do with it. Torch only.

    leader       rank 0          `broadcast.py`
    engine       rank e + 1      the loader's commands "join", "receive" and "leave" (`take_part`)

The group's objects are used directly, so torch.distributed's global state is touched on neither side: the trainer has
its own groups there, SGLang its own. gloo between CPUs, NCCL between GPUs. Ranks meet in a `TCPStore` that the leader
made on one address. Every wait has a deadline; a rank that ends closes its connections, which ends the others' waits.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_sglang.engine.background import in_thread
from megatron_sglang.engine.line import CutError

Backend = Literal["gloo", "nccl"]
COMMANDS = ("join", "receive", "leave")
_SHORTEST_S, _LONGEST_S = 0.0002, 0.01
"""Between two looks at a running broadcast."""


class GroupError(ConnectionError):
    """A rank of the group is gone, silent or late. The group is closed."""


class Group:
    """One rank's end.

    store: where all `size` ranks meet, each of them under the same prefix. address: this rank's, for gloo. Blocks until
    all are there; `GroupError` at the deadline. timeout_s: for that and for each broadcast.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, backend: Backend, timeout_s: float, address: str | None
    ) -> None:
        self.rank, self._timeout_s, self._connected = rank, timeout_s, backend == "gloo"
        self._group: Any = None
        wait = datetime.timedelta(seconds=timeout_s)
        try:
            if backend == "gloo":
                # Each rank listens on one address, where the others can reach it.
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._timeout, options._threads = wait, 2
                options._devices = [
                    dist.ProcessGroupGloo.create_device(hostname=address)
                    if address
                    else dist.ProcessGroupGloo.create_default_device()
                ]
                self._group = dist.ProcessGroupGloo(store, rank, size, options)
            else:
                # Its watchdog would end the process at the deadline; ours (`broadcast`) comes first, and aborts.
                nccl: Any = dist.ProcessGroupNCCL
                self._group = nccl(store, rank, size, 2 * wait + datetime.timedelta(seconds=60))
        except RuntimeError as error:
            raise GroupError(f"{size} ranks did not meet within {timeout_s:g} s: {_first_line(error)}") from error

    def broadcast(self, flat: torch.Tensor, give_up: Callable[[], bool] = lambda: False) -> None:
        """From rank 0 to all; complete on return. give_up: asked while waiting. A `GroupError` closes the group."""
        if self._group is None:
            raise GroupError("the group is closed")
        work, deadline = None, time.monotonic() + self._timeout_s

        def wait_for(is_done: Callable[[], bool]) -> None:
            pause = _SHORTEST_S
            while not is_done():
                if give_up():
                    raise GroupError("another rank has given up")
                if time.monotonic() > deadline:
                    raise GroupError(f"a rank did not take part within {self._timeout_s:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_S)

        try:
            if self._connected:
                work = self._begin(flat)
            else:  # NCCL connects now, in the calling thread and for as long as it takes
                beginning = in_thread(lambda: self._begin(flat))
                wait_for(beginning.done)
                work, self._connected = beginning.result(), True
            wait_for(work.is_completed)
            work.wait()
        except RuntimeError as error:
            self.close()
            raise GroupError(f"a rank is gone: {_first_line(error)}") from error
        except GroupError:
            self._abandon(work)
            work = None  # the traceback would keep it
            raise
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def _begin(self, flat: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext():  # a thread begins with GPU 0
            return self._group.broadcast([flat], options)

    def close(self) -> None:
        """Idempotent. gloo's connections end with the object, NCCL's kernels with `abort`."""
        group, self._group = self._group, None
        if group is not None and isinstance(group, getattr(dist, "ProcessGroupNCCL", ())):
            group.abort()

    def _abandon(self, work: Any) -> None:
        """Close while a broadcast runs. gloo's object cannot end before that does, at its own deadline or when a rank
        that it waits for has left, so nobody waits for it."""
        kept = [self._group, work]
        self.close()
        threading.Thread(target=kept.clear, daemon=True).start()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# ---- in an engine rank ----

_groups: dict[int, Group] = {}
"""By rank of the engine; more than one in the fake engine only."""


def take_part(message: Mapping[str, Any], device: torch.device) -> torch.Tensor | None:
    """Do a command of `COMMANDS`; of "receive" the flat bytes [message["bytes"]] uint8 that came.

    `CutError` if the group broke: then another rank, or the leader, knows the reason.
    """
    rank, command = message["rank"], message["command"]
    if command in ("join", "leave") and rank in _groups:
        _groups.pop(rank).close()
    try:
        if command == "join":
            _groups[rank] = _join(message)
        elif command == "receive":
            if rank not in _groups:
                raise GroupError("this rank is in no group")
            data = torch.empty(message["bytes"], dtype=torch.uint8, device=device)
            _groups[rank].broadcast(data)
            return data
    except GroupError as error:
        _groups.pop(rank, None)
        raise CutError(f"broadcast: {error}") from error
    return None


def _join(message: Mapping[str, Any]) -> Group:
    timeout_s = message["timeout_s"]
    try:
        store = dist.TCPStore(
            message["address"],
            message["port"],
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise GroupError(
            f"cannot reach the leader at {message['address']}:{message['port']}: {_first_line(error)}"
        ) from error
    return Group(store, message["group_rank"], message["size"], message["backend"], timeout_s, message["address"])
