"""Does the kernel merge as torch does, and how fast? Experts of one Qwen3-30B-A3B layer on one of 8 ranks, LoRA 32, cut
for an engine with TP 8 as the direct path cuts them.

    python benchmarks/merge_speed.py [--experts 16] [--output merge.json]

On a GPU. TRITON_INTERPRET=1 runs the kernel on a CPU, slowly: it shows that this program works, nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from stopwatch import seconds

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.weights import merge_kernel  # noqa: E402
from megatron_sglang.weights.factored import Factored  # noqa: E402

RANK, SCALE, ENGINE_TP, REPEATS = 32, 2.0, 8, 7
SHAPES = {"linear_fc1": (1536, 2048), "linear_fc2": (2048, 768)}
"""Gate and up stacked; down."""


def jobs_of(shapes: dict[str, tuple[int, int]], experts: int) -> list[merge_kernel.Job]:
    """Rows of gate and of up, columns of down, in the order in which they are sent."""
    jobs, flat = [], 0
    for target in range(ENGINE_TP):
        for number, (name, (rows, cols)) in enumerate(shapes.items()):
            for expert in range(experts):
                half, slim = rows // 2 // ENGINE_TP, cols // ENGINE_TP
                parts = [(target * half, 0, half, cols), (rows // 2 + target * half, 0, half, cols)]
                if name == "linear_fc2":
                    parts = [(0, target * slim, rows, slim)]
                for part in parts:
                    jobs.append(merge_kernel.Job(number * experts + expert, *part, flat, cols, RANK, SCALE, 0, 1.0))
                    flat += part[2] * part[3]
    return jobs


def by_torch(weights: list[Factored], jobs: list[merge_kernel.Job], out: torch.Tensor) -> torch.Tensor:
    """The same in fp32 temporaries."""
    sums = torch.zeros(3, dtype=torch.float64, device=out.device)
    wholes = []
    for part in weights:
        base = torch.stack(part.bases).float()
        delta = torch.bmm(part.up.float(), part.down.float()) * SCALE
        whole = (base + delta).to(out.dtype)
        lost = base + delta - whole.float()
        changed = (whole != torch.stack(part.bases).to(out.dtype)).sum()
        sums += torch.stack([delta.double().square().sum(), lost.double().square().sum(), changed.double()])
        wholes += list(whole)
    for job in jobs:
        piece = wholes[job.weight][job.row : job.row + job.rows, job.col : job.col + job.cols]
        out[job.flat : job.flat + job.rows * job.cols] = piece.reshape(-1)
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).bfloat16()

    weights = [
        Factored(
            tuple(drawn(*shape, scale=0.02) for _ in range(chosen.experts)),
            drawn(chosen.experts, RANK, shape[1], scale=0.02),
            drawn(chosen.experts, shape[0], RANK, scale=0.01),
        )
        for shape in SHAPES.values()
    ]
    jobs = jobs_of(SHAPES, chosen.experts)
    elements = sum(job.rows * job.cols for job in jobs)
    out, expected = (torch.empty(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    launch = merge_kernel.Launch(jobs, device)
    sums, exact = launch.run(weights, out)[0], by_torch(weights, jobs, expected)
    apart = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
    size = 2 * out.nbytes  # read and written
    kernel_s = seconds(lambda: launch.run(weights, out), device, REPEATS)
    torch_s = seconds(lambda: by_torch(weights, jobs, expected), device, REPEATS)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "megabytes": out.nbytes / 1e6,
        "jobs": len(jobs),
        "unequal": float((out != expected).float().mean()),
        "largest_difference": float(apart),
        "sums_relative_difference": [float(abs(a - b) / b) for a, b in zip(sums, exact, strict=True)],
        "kernel_s": kernel_s,
        "torch_s": torch_s,
        "kernel_GB_s": size / kernel_s / 1e9,
    }
    print(json.dumps(found, indent=1))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    # Products of bfloat16 are exact in fp32 and are only summed in another order: a last bit at times.
    return 0 if found["unequal"] < 1e-3 and found["largest_difference"] <= 2**-8 else 1


if __name__ == "__main__":
    sys.exit(main())
