"""Do the Triton kernels say of logits what torch says of them, logprobs, entropies and gradient, and how fast is each?

    python benchmarks/score_speed.py [--rows 20480] [--vocabulary 151936] [--output score.json]

By default a packed micro-batch of the flagship, bf16, on one rank: 6.2 GB of logits, and as much for each of three
gradients. On a GPU. TRITON_INTERPRET=1 runs the kernels on a CPU, slowly (--rows 8 --vocabulary 500): it shows that
this program works, nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from stopwatch import seconds

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang.training import score_kernel, scores  # noqa: E402

REPEATS, TEMPERATURE = 5, 0.9
BOUNDS = {"logprobs": 1e-5, "entropies": 1e-5, "gradient": 2**-7}
"""Largest differences, over the largest number: of fp32 sums in another order, and a last bit of bf16."""


def by(kernel: bool) -> None:
    """Which of the two answers from here on; on a CPU the kernel only in the interpreter."""
    scores._kernel_for = lambda _: score_kernel if kernel else None


def forward(logits: torch.Tensor, labels: torch.Tensor, *, entropies: bool) -> tuple[torch.Tensor, ...]:
    """Without entropies the logprobs alone."""
    found = scores.scores(logits, labels, TEMPERATURE, entropies=entropies)
    return found if entropies else found[:1]


def step(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *, entropies: bool) -> torch.Tensor:
    """Gradient of the weighted logprobs, and of the entropies too if asked for."""
    values = forward(logits, labels, entropies=entropies)
    return torch.autograd.grad(values, [logits], [weights] * len(values))[0]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest number, some rows at a time: of a gradient fp32 copies would take 25 GB."""
    pairs = zip(found.split(1024), expected.split(1024), strict=True)
    largest = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    return largest / max(float(part.abs().max()) for part in expected.split(1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20480)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # Drawn in bf16: of this size fp32 would be 12 GB more.
    logits = torch.randn(chosen.rows, chosen.vocabulary, device=device, dtype=torch.bfloat16).mul_(4).requires_grad_()
    labels = torch.randint(0, chosen.vocabulary, (chosen.rows,), device=device)
    weights = torch.randn(chosen.rows, device=device)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (1, lambda: forward(logits, labels, entropies=False)),
        "forward with entropies": (1, lambda: forward(logits, labels, entropies=True)),
        "forward and backward": (3, lambda: step(logits, labels, weights, entropies=False)),
        "the same with entropies": (3, lambda: step(logits, labels, weights, entropies=True)),
    }
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "rows": chosen.rows,
        "vocabulary": chosen.vocabulary,
        "logits_bytes": logits.nbytes,
    }
    for name, (passes, work) in works.items():
        took = []
        for kernel in (True, False):
            by(kernel)
            took.append(seconds(work, device, REPEATS))
        # What a kernel reads and writes: the logits forward; backward them and their gradient.
        speed = passes * logits.nbytes / took[0] / 1e9
        found[name] = {"kernel_s": took[0], "torch_s": took[1], "kernel_GB_s": speed}
        print(f"{name:24} kernel {took[0]:.5f} s ({speed:.0f} GB/s), torch {took[1]:.5f} s")
    differences = compared(logits, labels, weights)
    found["difference"] = differences
    print("largest difference over the largest number: " + json.dumps(differences))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(differences[name] <= BOUNDS[name.split()[0]] for name in differences) else 1


def compared(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    values = []
    for kernel in (True, False):
        by(kernel)
        values.append([value.detach() for value in forward(logits, labels, entropies=True)])
    names = ("logprobs", "entropies")
    differences = {name: apart(*pair) for name, pair in zip(names, zip(*values, strict=True), strict=True)}
    for entropies in (False, True):
        gradients = []
        for kernel in (True, False):
            by(kernel)
            gradients.append(step(logits, labels, weights, entropies=entropies))
        differences["gradient with entropies" if entropies else "gradient"] = apart(*gradients)
    return differences


if __name__ == "__main__":
    sys.exit(main())
