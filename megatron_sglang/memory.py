"""How much of the device is free in each phase of a rollout batch, and whether memory that was released came back.

    phase     when                                    checked
    build     model, optimizer and engine are there   -
    train     after a train step                      -
    sync      a weight version is published           -
    rollout   its samples are there                   -
    logprobs  old and reference logprobs are there    -
    resume    before the engine takes its memory back as much as it gave is free
    release   the engine has given its memory back    not less than after the second release, see below
    start     the same, before there is a model       what was free before the engine started, less ENGINE_KEEPS

The numbers are the device's own (cudaMemGetInfo), so they hold what every process has on it, and what a process's
allocator keeps counts as used. `memory/<phase>_free_gb` is the fullest device's, in 10^9 bytes. Nothing on a CPU.

What the trainer's own allocator keeps is added to what is free before two releases are compared: what is missing then,
others have. At the first one nothing has been trained, and communicators and workspaces of a first train step are for
good (4 GB with four ranks of Qwen3-30B-A3B), so the second is the measure. SGLang answers when its first rank is done
with a release, and 5 GB of the second one's were seen to come later: they are waited for.

`memory/<phase>_allocated_gb` and `_reserved_gb` are the trainer's own peaks since the phase before, of the largest
rank: in tensors, and in what torch's allocator holds for them. `memory/<phase>_others_gb` is what that does not hold of
the device, of the largest rank: the engine, and every process's context and communicators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatron_sglang import metrics
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.interfaces import Comm

GB = 10**9
TOLERANCE = 2 * GB
"""What may be missing at later releases: workspaces of longer sequences."""
SETTLES_S = 10.0
"""How long after SGLang's answer its last rank may take to give its memory back."""
ENGINE_KEEPS = 8 * GB
"""What an engine may keep when weights and KV cache are released: context, kernels, graphs, communicators."""


Peaks = Callable[[], Mapping[str, int]]


class Ledger:
    """Of one rank's device. read: gives its free bytes. own: bytes of it that this process's allocator keeps.
    take_peaks: by name, most bytes since it was last asked. total: bytes of the device; 0: not known."""

    def __init__(
        self,
        read: Callable[[], int],
        own: Callable[[], int] = lambda: 0,
        take_peaks: Peaks = dict,
        *,
        total: int = 0,
    ) -> None:
        self.free, self.own, self.take_peaks, self.total = read, own, take_peaks, total
        self._seen: dict[str, tuple[int, ...]] = {}
        """By phase, what was free the first two times, with what this process's allocator kept."""
        self.room = 0
        """What the engine gives back, and will take again; 0: not known."""

    @classmethod
    def of_device(cls) -> Ledger | None:
        """Of this process's CUDA device; None on a CPU."""
        import torch

        if not torch.cuda.is_available():
            return None
        total = torch.cuda.mem_get_info()[1]
        return cls(lambda: torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved, _take_peaks, total=total)

    def note(self, comm: Comm, phase: str, *, same: bool = False) -> dict[str, metrics.Metric]:
        """The metrics of `phase`. Collective. same: also require on every rank that, with what this process's allocator
        keeps, as much is free as when the phase was noted for the second time (module's docstring); if not,
        `MegatronSglangError` on all ranks."""
        error = None
        if same:
            try:
                self._require_same(phase)
            except MegatronSglangError as found:
                error = found
        comm.agree(error)
        free, own = self.free(), self.own()
        others = {"others": self.total - free - own} if self.total else {}
        ranks = comm.gather({"free": free, **others, **self.take_peaks()})
        peaks = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "free"}
        noted: dict[str, metrics.Metric] = {
            f"memory/{phase}_{name}_gb": metrics.Max(peak / GB) for name, peak in peaks.items()
        }
        return noted | {f"memory/{phase}_free_gb": metrics.Last(min(rank["free"] for rank in ranks) / GB)}

    def note_room(self, before: int) -> None:
        """The engine has given its memory back; `before` bytes were free until then. It gives the same each time, but
        a rank of it may be late: the most that was seen counts."""
        self.room = max(self.room, self.free() - before)

    def await_room(self, size: int) -> None:
        """Return when so many bytes are free, or after `SETTLES_S`: a rank of the engine may be late with its release.
        Whoever needs them then finds out."""
        _awaited(self.free, size)

    def require_room(self, comm: Comm) -> None:
        """`MegatronSglangError` on all ranks if the engine rank beside one of them would find less memory than it gave
        back, because it would run out of memory and end. Collective."""
        free, error = self.free(), None
        if free < self.room - TOLERANCE:
            error = MegatronSglangError(
                f"memory at resume: {free / GB:.1f} GB of the device are free, the engine takes {self.room / GB:.1f} "
                "GB back: the trainer has kept more than before its last train step; lower sglang.mem_fraction_static "
                "or --max-seqlen-per-dp-cp-rank (--micro-batch-size)"
            )
        comm.agree(error)

    def require(self, phase: str, expected: int, *, tolerance: int) -> None:
        """`MegatronSglangError` if fewer than `expected` - `tolerance` bytes are free, and stay so for `SETTLES_S`."""
        self._settled(phase, self.free, expected, tolerance)

    def _require_same(self, phase: str) -> None:
        seen = self._seen.get(phase, ())
        expected = seen[1] if len(seen) == 2 else 0
        free = self._settled(phase, lambda: self.free() + self.own(), expected, TOLERANCE)
        self._seen[phase] = (*seen, free)[:2]

    @staticmethod
    def _settled(phase: str, read: Callable[[], int], expected: int, tolerance: int) -> int:
        """What is free, when that is enough."""
        free = _awaited(read, expected - tolerance)
        if free < expected - tolerance:
            raise MegatronSglangError(
                f"memory at {phase}: {free / GB:.1f} GB of the device are free, expected {expected / GB:.1f} GB or at "
                f"most {tolerance / GB:.1f} GB less: released memory did not come back; the engine must run with "
                "enable_memory_saver, with torch_memory_saver installed, and no other process on this device"
            )
        return free


def _awaited(read: Callable[[], int], enough: int) -> int:
    """What `read` gives when that is enough, or after `SETTLES_S`."""
    deadline = time.monotonic() + SETTLES_S
    while (found := read()) < enough and time.monotonic() < deadline:
        time.sleep(SETTLES_S / 1000)
    return found


def _take_peaks() -> dict[str, int]:
    import torch

    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return peaks
