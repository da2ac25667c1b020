"""How fast do an engine rank's two passes over a delivery go, and are their digests those that torch computes?

    python benchmarks/copy_speed.py [--megabytes 490] [--output copy.json]

A delivery as Qwen3-30B-A3B's: of each trainer rank the experts that it holds, into the fused parameters of one layer
and a part of the next, one stretch of memory each. `write` moves it and digests it, `read` digests what the parameters
hold; a bare copy of the same bytes is the yardstick. On a GPU. TRITON_INTERPRET=1 runs it on a CPU, slowly: it shows
that this program works, nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang import copy_kernel, digests  # noqa: E402
from megatron_sglang.copies import Copy  # noqa: E402

SOURCES, ALIGN, REPEATS, ITEMSIZE = 2, 2048, 9, 2
"""Stretches of whole rows, as the model's hidden size makes them: what the kernel cannot cut into tiles is slow."""
SHARES = {"w13": 2 / 3, "w2": 1 / 3}
"""Of a layer's experts: gate and up, down."""


def delivery(megabytes: int) -> tuple[list[Copy], list[int]]:
    """Copies in the order of arrival, and the elements of each trainer rank."""
    elements, copies, flat = megabytes * 10**6 // ITEMSIZE, [], 0
    sizes = {name: int(elements * share / SOURCES) // ALIGN * ALIGN for name, share in SHARES.items()}
    for source in range(SOURCES):
        for name, size in sizes.items():
            copies.append(Copy(name, source * size, flat, (size,), (1,), (1,)))
            flat += size
    return copies, [sum(sizes.values())] * SOURCES


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median by the device's own clock, when it has been compiled."""
    work()
    if device.type != "cuda":
        return 0.0
    took = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(took)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=490)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    copies, lengths = delivery(chosen.megabytes)
    total = sum(lengths)
    flat = torch.randn(total, device=device).bfloat16()
    names = list(SHARES)
    held = {name: sum(copy.sizes[0] for copy in copies if copy.tensor == name) for name in names}
    parameters = {name: torch.zeros(size, dtype=torch.bfloat16, device=device) for name, size in held.items()}
    addresses = torch.tensor([parameters[name].data_ptr() for name in names], device=device)
    moves = copy_kernel.Moves(copies, lengths, {name: at for at, name in enumerate(names)}, ITEMSIZE, device)
    written, read = moves.write(flat, addresses).tolist(), moves.read(addresses).tolist()
    expected = digests.digests(flat.split(lengths))
    right = all(torch.equal(copy.of(parameters[copy.tensor]), copy.of_flat(flat)) for copy in copies)
    other = torch.empty_like(flat)
    took = {
        "write": seconds(lambda: moves.write(flat, addresses), device),
        "read": seconds(lambda: moves.read(addresses), device),
        "bare copy": seconds(lambda: other.copy_(flat), device),
    }
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "megabytes": total * ITEMSIZE / 1e6,
        "tile": {"rows": copy_kernel.ROWS, "words": copy_kernel.COLS, "warps": copy_kernel.WARPS},
        "seconds": took,
        "GB_s": {name: total * ITEMSIZE / one / 1e9 for name, one in took.items() if one},
        "equal": right and written == read == expected,
    }
    print(json.dumps(found, indent=1))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
