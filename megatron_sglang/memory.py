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
good (4 GB with four ranks of Qwen3-30B-A3B), so the second is the measure. An engine's allocator keeps now more, now
less of what its batches took (up to 3.6 GB were seen to come and go), so a leak is what is missing `IN_A_ROW` times.

`memory/<phase>_allocated_gb` and `_reserved_gb` are the trainer's own peaks since the phase before, of the largest
rank: in tensors, and in what torch's allocator holds for them. `memory/<phase>_others_gb` is what that does not hold of
the device, of the largest rank: the engine, and every process's context and communicators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from megatron_sglang import metrics
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.interfaces import Comm

GB = 10**9
TOLERANCE = 2 * GB
"""What may be missing at later releases: workspaces of longer sequences."""
IN_A_ROW = 4
"""As many releases at which more is missing are a leak."""
AT_ONCE = 8 * GB
"""More than this is missing at no release."""
ENGINE_KEEPS = 10 * GB
"""What may be missing when weights and KV cache of an engine are released, before there is a model: its context,
kernels, graphs and communicators, and the trainer's own."""


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
        self._measure: dict[str, tuple[int, ...]] = {}
        """By phase, what was free the first two times."""
        self._recent: dict[str, deque[int]] = {}
        """By phase, what was free since, the last few times."""
        self.room = 0
        """What the engine gave back the last time, and will take; 0: not known."""

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
        free, own, error = self.free(), self.own(), None
        if same:
            try:
                self._require_same(phase, free + own)
            except MegatronSglangError as found:
                error = found
        comm.agree(error)
        others = {"others": self.total - free - own} if self.total else {}
        ranks = comm.gather({"free": free, **others, **self.take_peaks()})
        peaks = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "free"}
        noted: dict[str, metrics.Metric] = {
            f"memory/{phase}_{name}_gb": metrics.Max(peak / GB) for name, peak in peaks.items()
        }
        return noted | {f"memory/{phase}_free_gb": metrics.Last(min(rank["free"] for rank in ranks) / GB)}

    def note_room(self, before: int) -> None:
        """The engine has given its memory back; `before` bytes were free until then."""
        self.room = max(0, self.free() - before)

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
        """`MegatronSglangError` if fewer than `expected` - `tolerance` bytes are free now."""
        self._require(phase, self.free(), expected, tolerance)

    def _require_same(self, phase: str, free: int) -> None:
        """free: with what this process's allocator keeps."""
        measure = self._measure.get(phase, ())
        if len(measure) < 2:
            self._measure[phase] = (*measure, free)
            return
        recent = self._recent.setdefault(phase, deque(maxlen=IN_A_ROW))
        recent.append(free)
        self._require(phase, free, measure[1], AT_ONCE)
        if len(recent) == IN_A_ROW:
            self._require(f"{phase}, {IN_A_ROW} times in a row", max(recent), measure[1], TOLERANCE)

    @staticmethod
    def _require(phase: str, free: int, expected: int, tolerance: int) -> None:
        if free < expected - tolerance:
            raise MegatronSglangError(
                f"memory at {phase}: {free / GB:.1f} GB of the device are free, expected {expected / GB:.1f} GB or at "
                f"most {tolerance / GB:.1f} GB less: released memory did not come back; the engine must run with "
                "enable_memory_saver, with torch_memory_saver installed, and no other process on this device"
            )


def _take_peaks() -> dict[str, int]:
    import torch

    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return peaks
