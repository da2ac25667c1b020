"""Digest, copies and the engine rank's side of a delivery by Triton kernels, as on a GPU, are what torch makes of them.

In Triton's interpreter, which needs no GPU; it is chosen when Triton is imported, hence processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_e2e

DIGESTS = """
import torch
from megatron_sglang import digest_kernel, digests

cpu = torch.device("cpu")
lanes, each = digest_kernel.SHAPE.lanes, digest_kernel.SHAPE.words
edges = [at + step for at in (lanes, each // digest_kernel.SHAPE.blocks, each, 2 * each) for step in (-1, 0, 1)]
counts = (1, 7, *edges, 30_000, 1)
many = [torch.randint(-(2**62), 2**62, (count,)) * 2 + 1 for count in counts]
by_torch = [digests._mixed_sum(words, 0).item() + count for words, count in zip(many, counts)]
assert digests.digests(many) == by_torch
assert all(words.data_ptr() % 16 == 0 for words in many)
shifted = [torch.cat([words[:1], words])[1:] for words in many]
assert not any(words.data_ptr() % 16 == 0 for words in shifted)
digests.is_on_gpu = lambda _: True
usual = digest_kernel.SHAPE
for shape in (usual, digest_kernel.Shape(4, 2, 1), digest_kernel.Shape(1, 8, 3)):
    digest_kernel.SHAPE = shape
    assert digests.digests(many) == by_torch, shape
    assert digests.digests(shifted) == by_torch, shape
digest_kernel.SHAPE = usual
long = many[-2]
odd_places = [long[1:3].view(torch.int16)[1:7], long.view(torch.int32)[3:10:2], many[0][:0]]
found = digests.digests(odd_places)
lengths = [8, 0, 4, 4096, 30_000]
flat = torch.randn(sum(lengths)).bfloat16()
segments = digests.segments_of(flat, lengths)
by_segment = segments.digests(flat).tolist()
assert digests.segments_of(flat, [3, len(flat) - 3]) is None, "a part ends within a word"
large = [8, 4096, 0, 30_008]  # each begins at a multiple of 16 bytes, as the buffer does or does not
at_large = torch.randn(sum(large) + 8).bfloat16()
assert at_large.data_ptr() % 16 == 0
by_place = [digests.segments_of(part, large).digests(part).tolist() for part in (at_large[:-8], at_large[4:-4])]
digests.is_on_gpu = lambda _: False
assert found == digests.digests(odd_places)
for found, part in zip(by_place, (at_large[:-8], at_large[4:-4])):
    expected = digests.digests(part.split(large))
    assert [found[at] for at in (0, 1, 3)] == [expected[at] for at in (0, 1, 3)]
assert [by_segment[at] for at in (0, 2, 3, 4)] == digests.digests([flat.split(lengths)[at] for at in (0, 2, 3, 4)])

huge = {torch.bfloat16: 3e38, torch.float16: 65504.0, torch.float32: 3e38, torch.float64: 1e308}
tensors, wanted = [torch.arange(-5, 5)], [True]
for dtype, most in huge.items():
    for value in (most, -most, 0.0, -0.0, torch.inf, -torch.inf, torch.nan):
        for at in (0, 1, 4098, 9999):
            tensor = torch.full((10_000,), 1.5).to(dtype)  # its last words are few, and no whole block
            tensor[at] = value
            tensors.append(tensor)
            wanted.append(bool(tensor.isfinite().all()))
assert wanted.count(True) == 4 * 4 * 4 + 1
by_torch = digests.finite_digests(tensors)
digests.is_on_gpu = lambda _: True
by_kernel = digests.finite_digests(tensors)
assert by_kernel == by_torch
assert by_kernel[1] == wanted

# Laid out once for several versions; what is not whole words is digested as it is each time.
for tensors in ([torch.randn(5000), torch.randn(12, 4).bfloat16()], [torch.randn(5000), torch.randn(7)]):
    proof = digests.Finite(tensors)
    assert (proof._sums is not None) == (len(tensors[1]) == 12)
    for value in (2.0, torch.inf, 3.0):
        tensors[1][3] = value
        assert proof.fits(tensors)
        assert proof.of(tensors) == digests.finite_digests(tensors)
        assert proof.of(tensors)[1] == [True, value != torch.inf]
    assert not proof.fits([tensors[0], tensors[1].clone()])
print("equal")
"""

DELIVERY = """
import torch
from megatron_sglang import copies, digests
from megatron_sglang.copy_kernel import Moves
from megatron_sglang.engine import direct

names = {"a": (40, 96), "b": (3, 2, 8, 160), "c": (5000,), "d": (7, WIDTH)}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in names.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full(shape, torch.nan, dtype=torch.DTYPE)))

# Columns of a, in two halves of evenly spaced groups of rows; b by its last axes; c whole, long enough for rows of its
# own; d row by row backwards.
rectangles = [("a", 96 * row + 48 * half, 4, 48, 96, 1) for half in (0, 1) for row in range(0, 40, 4)]
rectangles += [("b", 1280 * outer + 80 * half, 8, 80, 160, 1) for half in (1, 0) for outer in range(6)]
rectangles += [("c", 0, 1, 5000, 5000, 1)] + [("d", WIDTH * row, 1, WIDTH, WIDTH, 1) for row in reversed(range(7))]
made = copies.fold(rectangles)
assert any(len(copy.sizes) > 2 for copy in made), made
total = sum(rows * cols for _, _, rows, cols, _, _ in rectangles)
# Segments end within a copy, a row and a tile; some are empty.
lengths = [3000, 0, 2004, 4, 0, total - 5008]
flat = torch.randn(total).to(torch.DTYPE)
message = {"dtype": "DTYPE", "lengths": lengths, "digests": digests.digests(flat.split(lengths))}
rows = [(c.tensor, c.offset, c.flat, c.sizes, c.strides, c.flat_strides) for c in made]

def delivered(by_kernel, changed=None):
    model = Model()
    plan = direct.check(model, {"buckets": [rows], "constants": []})
    digests.is_on_gpu = lambda _: by_kernel
    data = flat.clone()
    if changed is not None:
        data[changed] += 1
    direct.deliver(direct.Live(model), plan, 0, message, data.view(torch.uint8))
    assert (plan.launches[0] is not None) == (by_kernel and BY_KERNEL)
    return dict(model.named_parameters())

expected, found = delivered(False), delivered(True)
assert all(torch.equal(found[name], expected[name]) for name in names)
assert not any(parameter.isnan().any() for parameter in found.values())
for by_kernel in (False, True):
    for changed, source in ((0, 0), (2999, 0), (3000, 2), (5003, 2), (5004, 3), (5008, 5), (total - 1, 5)):
        try:
            delivered(by_kernel, changed)
        except ValueError as error:
            assert f"part of trainer rank {source}, for " in str(error), error
            assert ": arrived with digest" in str(error), error
            named = str(error).partition(", for ")[2].partition(":")[0].split(", ")
            assert set(named) < set(names), error
            assert {0: made[0].tensor, total - 1: made[-1].tensor}.get(changed, named[0]) in named, error
        else:
            raise AssertionError("a changed element was not noticed")

class Forgetful(Moves):
    def write(self, flat, addresses):
        found = super().write(flat, addresses)
        super().write(flat.roll(1), addresses)
        return found

class Missing(Moves):
    def write(self, flat, addresses):
        found = super().write(flat, addresses)
        parameters["d"].view(torch.int16)[-1, -1] ^= 1  # a single bit of what has been written
        return found

class Watched(direct.Live):
    def __init__(self, model):
        super().__init__(model)
        parameters.update(self.parameters)

import megatron_sglang.copy_kernel
parameters, direct.Live = {}, Watched
for faulty in (Forgetful, Missing) if BY_KERNEL else ():
    megatron_sglang.copy_kernel.Moves = faulty
    try:
        delivered(True)
    except ValueError as error:
        assert "reads back from the parameters as digest" in str(error), error
        assert faulty is Forgetful or "part of trainer rank 5, for " in str(error), error
    else:
        raise AssertionError("other bytes in the parameters were not noticed")
print("equal")
"""


def delivery(dtype: str, width: int, *, by_kernel: bool) -> str:
    values = {"DTYPE": dtype, "WIDTH": str(width), "BY_KERNEL": str(by_kernel)}
    return re.sub("|".join(values), lambda found: values[found[0]], DELIVERY)


PROGRAMS = {
    "digests": DIGESTS,
    "large words": delivery("bfloat16", 16, by_kernel=True),
    "small words": delivery("bfloat16", 12, by_kernel=True),
    "fp32": delivery("float32", 12, by_kernel=True),
    "rows of broken words": delivery("bfloat16", 13, by_kernel=False),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_the_kernels_compute_the_same(program: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]
