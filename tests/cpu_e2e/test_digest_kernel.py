"""Digest, copies and the engine rank's side of a delivery by Triton kernels, as on a GPU, are what torch makes of them.

In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_e2e

DIGESTS = """
import torch
from megatron_sglang import digest_kernel, digests

cpu = torch.device("cpu")
counts = (1, 7, 4095, 4096, 4097, 30_000, 1)
many = [torch.randint(-(2**62), 2**62, (count,)) * 2 + 1 for count in counts]
by_torch = [digests._mixed_sum(words, 0).item() + count for words, count in zip(many, counts)]
assert digests.digests(many) == by_torch
digests.is_on_gpu = lambda _: True
assert digests.digests(many) == by_torch
odd_places = [many[5][1:3].view(torch.int16)[1:7], many[5].view(torch.int32)[3:10:2], many[0][:0]]
found = digests.digests(odd_places)
lengths = [8, 0, 4, 4096, 30_000]
flat = torch.randn(sum(lengths)).bfloat16()
segments = digests.segments_of(flat, lengths)
by_segment = segments.digests(flat).tolist()
assert digests.segments_of(flat, [3, len(flat) - 3]) is None, "a part ends within a word"
digests.is_on_gpu = lambda _: False
assert found == digests.digests(odd_places)
assert [by_segment[at] for at in (0, 2, 3, 4)] == digests.digests([flat.split(lengths)[at] for at in (0, 2, 3, 4)])

huge = {torch.bfloat16: 3e38, torch.float16: 65504.0, torch.float32: 3e38, torch.float64: 1e308}
tensors, wanted = [torch.arange(-5, 5)], [True]
for dtype, most in huge.items():
    for value in (most, -most, 0.0, -0.0, torch.inf, -torch.inf, torch.nan):
        for at in (0, 1, 4098, 9999):
            tensor = torch.full((10_000,), 1.5).to(dtype)
            tensor[at] = value
            tensors.append(tensor)
            wanted.append(bool(tensor.isfinite().all()))
assert wanted.count(True) == 4 * 4 * 4 + 1
by_torch = digests.finite_digests(tensors)
digests.is_on_gpu = lambda _: True
by_kernel = digests.finite_digests(tensors)
assert by_kernel == by_torch
assert by_kernel[1] == wanted
print("equal")
"""

DELIVERY = """
import random
import torch
from megatron_sglang import copies, digests
from megatron_sglang.copy_kernel import Moves, takes
from megatron_sglang.engine import direct

random.seed(3)
names = {"a": (40, 96), "b": (3, 2, 8, 160), "c": (5000,), "d": (7, 13)}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in names.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full(shape, torch.nan, dtype=torch.bfloat16)))

# Columns of a, in two halves of evenly spaced groups of rows; b by its last axes; c whole; d row by row backwards.
rectangles = [("a", 96 * row + 48 * half, 4, 48, 96, 1) for half in (0, 1) for row in range(0, 40, 4)]
rectangles += [("b", 1280 * outer + 80 * half, 8, 80, 160, 1) for half in (1, 0) for outer in range(6)]
rectangles += [("c", 0, 1, 5000, 5000, 1)] + [("d", 13 * row, 1, 13, 13, 1) for row in reversed(range(7))]
made = copies.fold(rectangles)
assert all(map(takes, made)) and any(len(copy.sizes) > 2 for copy in made), made
sizes = [rows * cols for _, _, rows, cols, _, _ in rectangles]
total = sum(sizes)
lengths = [total // 8 * 4, 0, total - total // 8 * 4]
lengths = [lengths[0] - lengths[0] % 4, 0, total - lengths[0] + lengths[0] % 4]
if lengths[2] % 4:
    rectangles.append(("e", 0, 1, 4 - lengths[2] % 4, 4, 1))
    names["e"] = (4 - lengths[2] % 4,)
    made, total = copies.fold(rectangles), total + names["e"][0]
    lengths[2] += names["e"][0]
flat = torch.randn(total).bfloat16()
message = {"dtype": "bfloat16", "lengths": lengths, "digests": digests.digests(flat.split(lengths))}
rows = [(c.tensor, c.offset, c.flat, c.sizes, c.strides, c.flat_strides) for c in made]

def delivered(by_kernel, changed=None):
    model = Model()
    plan = direct.check(model, {"buckets": [rows], "constants": []})
    digests.is_on_gpu = lambda _: by_kernel
    data = flat.clone()
    if changed is not None:
        data[changed] += 1
    direct.deliver(direct.Live(model), plan, 0, message, data.view(torch.uint8))
    assert (plan.launches[0] is not None) == by_kernel
    return dict(model.named_parameters())

expected, found = delivered(False), delivered(True)
assert all(torch.equal(found[name], expected[name]) for name in names)
assert not any(parameter.isnan().any() for parameter in found.values())
for by_kernel in (False, True):
    for changed, source in ((0, 0), (total - 1, 2)):
        try:
            delivered(by_kernel, changed)
        except ValueError as error:
            assert f"part of trainer rank {source}, for " in str(error), error
            assert ": arrived with digest" in str(error), error
            named = str(error).partition(", for ")[2].partition(":")[0].split(", ")
            assert set(named) < set(names) and (made[0] if changed == 0 else made[-1]).tensor in named, error
        else:
            raise AssertionError("a changed element was not noticed")

class Forgetful(Moves):
    def write(self, flat, addresses):
        super().write(flat.roll(1), addresses)

import megatron_sglang.copy_kernel
megatron_sglang.copy_kernel.Moves = Forgetful
try:
    delivered(True)
except ValueError as error:
    assert "reads back from the parameters as digest" in str(error), error
else:
    raise AssertionError("other bytes in the parameters were not noticed")
print("equal")
"""


@pytest.mark.parametrize("program", [DIGESTS, DELIVERY], ids=["digests", "delivery"])
def test_the_kernels_compute_the_same(program: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
