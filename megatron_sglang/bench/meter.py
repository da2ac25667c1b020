"""What a measurement counts: what went through torch.distributed, and what processes hold."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Traffic:
    """Of one rank: floating point elements that `all_to_all_single` moved."""

    calls: int = 0
    sent: dict[int, int] = field(default_factory=dict)
    """Bytes by target rank."""


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what the block really sends, by listening at torch's own function."""
    found, original = Traffic(), dist.all_to_all_single

    def listening(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.is_floating_point():
            sizes = args[1] if len(args) > 1 else kwargs["input_split_sizes"]
            found.calls += 1
            for target, size in enumerate(sizes):
                found.sent[target] = found.sent.get(target, 0) + size * input.element_size()
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = listening
    try:
        yield found
    finally:
        dist.all_to_all_single = original


@contextlib.contextmanager
def device_peak() -> Iterator[list[int]]:
    """One number: bytes that this process allocated on its device at most in the block, beyond what it had before."""
    found = [0]
    if not torch.cuda.is_initialized():
        yield found
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found[0] = torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Writes where the block's time went, by torch's profiler; None: not on this rank."""
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    averages = profiler.key_averages()
    orders = ["self_cuda_time_total", "self_cpu_time_total"] if cuda else ["self_cpu_time_total"]
    path.write_text("\n".join(averages.table(sort_by=order, row_limit=40) for order in orders))


EXCHANGE_BYTES = 1 << 30


def all_to_all_seconds(sizes: Sequence[Sequence[int]], device: torch.device, repeats: int) -> float:
    """Median seconds of exchanging these bytes and doing nothing else: the limit of any path. sizes: [source][target]
    bytes, the same on all ranks. In rounds of at most EXCHANGE_BYTES a rank, since a model does not fit twice beside
    itself. Collective."""
    rank = dist.get_rank()
    largest = max(map(sum, [*sizes, *zip(*sizes, strict=True)]))
    rounds = max(1, -(-largest // EXCHANGE_BYTES))

    def part(size: int, number: int) -> int:
        return size * (number + 1) // rounds - size * number // rounds

    outs = [[part(size, number) for size in sizes[rank]] for number in range(rounds)]
    intos = [[part(row[rank], number) for row in sizes] for number in range(rounds)]
    send = torch.zeros(max(map(sum, outs)), dtype=torch.uint8, device=device)
    receive = torch.empty(max(map(sum, intos)), dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        with timed() as took:
            for out, into in zip(outs, intos, strict=True):
                dist.all_to_all_single(receive[: sum(into)], send[: sum(out)], into, out)
        seconds.append(took[0])
    return statistics.median(seconds[1:])


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """One number, the seconds of the block, device included."""
    import time

    took = [0.0]
    began = time.perf_counter()
    yield took
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    took[0] = time.perf_counter() - began


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """min, median, p99 and max."""
    ordered = sorted(numbers)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"min": ordered[0], "median": statistics.median(ordered), "p99": p99, "max": ordered[-1]}


@dataclass(frozen=True, slots=True)
class Holdings:
    """What processes hold: resident memory and (this process) device memory in bytes, open file descriptors."""

    resident: int
    descriptors: int
    device: int

    @staticmethod
    def of(pids: Sequence[int]) -> Holdings:
        resident = descriptors = 0
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        return Holdings(resident, descriptors, torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0)


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found
