"""Is the digest by the Triton kernel the one that torch computes, and how fast does each read?

    python benchmarks/digest_speed.py [--megabytes 1024] [--output digest.json] [--sweep]

On a GPU. TRITON_INTERPRET=1 runs the kernel on a CPU, slowly: it shows that this program works, nothing of speed.
--sweep: instead, how fast the kernel reads by itself for each of some `digest_kernel.Shape`, the present one first,
with and without looking for what is not finite; one JSON line each, about two seconds, and the fastest at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang import digest_kernel, digests  # noqa: E402

REPEATS = 5

SHAPES = [
    (8, 2, 8), (8, 2, 16), (8, 4, 4), (8, 4, 16), (8, 8, 4), (4, 2, 16), (4, 4, 8), (4, 4, 16), (4, 8, 8), (16, 2, 8),
    (16, 4, 4),
]  # fmt: skip
"""Warps, reads and blocks of `digest_kernel.Shape`, beside the present one."""


def by_kernel(tensors: list[torch.Tensor]) -> list[int]:
    return digests._by_kernel(digest_kernel, tensors, look=False)[0].tolist()


def by_torch(tensors: list[torch.Tensor]) -> list[int]:
    found = []
    for tensor in tensors:
        words = digests._words(tensor)
        starts = range(0, words.numel(), digests.CHUNK_WORDS)
        parts = [digests._mixed_sum(words[start : start + digests.CHUNK_WORDS], start) for start in starts]
        found.append((torch.stack(parts).sum() + tensor.numel()).item())
    return found


def seconds(compute: Callable[[list[torch.Tensor]], list[int]], tensors: list[torch.Tensor]) -> float:
    """Median, the first call (which compiles) left out."""
    took = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        compute(tensors)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def sweep(flat: torch.Tensor) -> tuple[list[dict[str, object]], bool]:
    """GB/s of each shape for `flat` in 400 parts, kernel alone; and whether all gave the same sums."""
    usual, results = digest_kernel.SHAPE, []
    parts = [part.clone() for part in flat.tensor_split(400)]  # each at an address of its own, as parameters are
    expected = digests._by_kernel(digest_kernel, parts, look=False)[0]
    equal = True
    for shape in dict.fromkeys([usual, *(digest_kernel.Shape(*sizes) for sizes in SHAPES)]):
        digest_kernel.SHAPE = shape
        result: dict[str, object] = shape._asdict()
        for name, look in (("GB_s", False), ("GB_s_look", True)):
            sums, _ = digests._laid_out(digest_kernel, parts, look=look)
            same = torch.equal(sums.run()[0], expected)
            result[name] = round(sum(part.nbytes for part in parts) / launched_s(sums) / 1e9)
            equal &= same
            result["equal"] = bool(result.get("equal", True)) and same
        results.append(result)
        print(json.dumps(result), flush=True)
    digest_kernel.SHAPE = usual
    for name in ("GB_s", "GB_s_look"):
        print(f"fastest by {name}: {max(results, key=lambda one: one[name])}")  # type: ignore[arg-type, return-value]
    return results, equal


def launched_s(sums: digest_kernel.Sums) -> float:
    """Median seconds of one run on the device, when it has been compiled; several are given to it at once."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        sums.run()
        return time.perf_counter() - began
    sums.run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4 * REPEATS + 1)]
    for event in events:
        event.record()
        sums.run()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events)) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sweep", action="store_true")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elements = chosen.megabytes * 10**6 // 2
    torch.manual_seed(0)
    flat = torch.randn(elements, device=device).bfloat16()
    if chosen.sweep:
        results, equal = sweep(flat)
        if chosen.output is not None:
            chosen.output.write_text(json.dumps(results, indent=1) + "\n")
        return 0 if equal else 1
    cases = {
        "one tensor": [flat],
        "400 tensors": list(flat.tensor_split(400)),
        "odd sizes and places": [flat[1:5], flat[3:4], flat[:0], flat[7:8200], flat.view(-1, 10)[:, ::2]],
    }
    found: dict[str, object] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    equal = True
    for name, tensors in cases.items():
        same = by_kernel(tensors) == by_torch(tensors)
        equal &= same
        size = sum(tensor.nbytes for tensor in tensors)
        kernel, torch_s = seconds(by_kernel, tensors), seconds(by_torch, tensors)
        found[name] = {"equal": same, "kernel_s": kernel, "torch_s": torch_s, "kernel_GB_s": size / kernel / 1e9}
        print(f"{name:22} equal={same} kernel {kernel:.5f} s ({size / kernel / 1e9:.0f} GB/s), torch {torch_s:.5f} s")
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
