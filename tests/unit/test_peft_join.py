"""PEFT's adapters of q, k, v or gate, up made into the one adapter that Megatron's fused layer has."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.precision import nearest
from megatron_sglang.weights.peft_format import Factors, join

DTYPES = [torch.float32, torch.bfloat16]
FP64 = Fraction(4, 2**53)
"""Relative error of a few operations."""


@settings(max_examples=50)
@given(
    shared=st.integers(0, 3),
    own=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    scales=st.sampled_from([1.0, 4.0]),
)
def test_joined_factors_make_the_same_deltas(shared: int, own: list[int], scales: float) -> None:
    """A fused layer whose parts were joined wrongly trains on from another model; and parts that share rows of A must
    not need the rank of all of them."""
    if shared + min(own) == 0:
        own = [rank + 1 for rank in own]
    common = torch.randn(shared, 5)
    parts = []
    for index, rank in enumerate(own):
        down = torch.cat([torch.randn(rank, 5), common])
        parts.append(Factors(down, torch.randn(index + 2, rank + shared), scales if index else 2.0))
    joined = join(parts, scale=2.0, dtype=torch.float32)
    assert len(joined.down) == shared + sum(own)
    expected = torch.cat([part.scale * part.up @ part.down for part in parts])
    torch.testing.assert_close(joined.scale * joined.up @ joined.down, expected)


def test_rows_that_repeat_within_a_part_are_added() -> None:
    """peft doubles the rank of gate_up_proj; with gate and up sharing A, half of it is a repetition."""
    down = torch.randn(2, 4)
    gate, up = torch.randn(3, 2), torch.randn(3, 2)
    stacked = Factors(torch.cat([down, down]), torch.block_diag(gate, up))
    joined = join([stacked], scale=1.0, dtype=torch.float32)
    assert torch.equal(joined.down, down)
    assert torch.equal(joined.up, torch.cat([gate, up]))


def is_nearest(found: torch.Tensor, exact: list[Fraction], within: Fraction = Fraction(0)) -> list[bool]:
    """For each of `found`: no other number of its dtype is nearer to `exact`, but for a relative error of `exact`.
    Computed in whole numbers."""
    away = [
        torch.nextafter(found, torch.full_like(found, end)).flatten().tolist() for end in (-float("inf"), float("inf"))
    ]
    return [
        all(abs(Fraction(one) - wanted) <= abs(Fraction(other) - wanted) + within * abs(wanted) for other in others)
        for one, wanted, *others in zip(found.flatten().tolist(), exact, *away, strict=True)
    ]


@pytest.mark.parametrize("into", DTYPES, ids=str)
@pytest.mark.parametrize("given_as", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 16 / 7**0.5, 1 / 3], ids=str)
def test_a_part_of_another_scale_is_rounded_once(given_as: torch.dtype, into: torch.dtype, scale: float) -> None:
    """In the adapter's own dtype the product is rounded by bf16's 2^-9 also where the model keeps fp32, and before rows
    that repeat are added; fp32 on its way to bf16 is rounded twice."""
    down = torch.randn(6, 4)
    same = Factors(down.to(given_as), torch.randn(50, 6).to(given_as), 2.0)
    other = Factors(down[[0, 1, 2, 3, 0, 1]].to(given_as), torch.randn(50, 6).to(given_as), scale)
    joined = join([same, other], 2.0, into)
    assert (joined.down.dtype, joined.up.dtype, joined.up.shape) == (into, into, (100, 6))
    ratio = Fraction(scale) / 2
    rows = [[Fraction(number) for number in row] for row in other.up.tolist()]
    exact = [ratio * one for row in rows for one in (row[0] + row[4], row[1] + row[5], row[2], row[3])]
    assert all(is_nearest(joined.up[50:, :4], exact, within=FP64))
    assert torch.equal(joined.up[50:, 4:], torch.zeros(50, 2, dtype=into))
    assert torch.equal(joined.up[:50], same.up.to(into))


def test_a_number_that_fp32_would_put_in_the_middle_is_rounded_the_right_way() -> None:
    """torch goes from fp64 to bf16 by fp32: 1 + 2^-8 + 2^-40 becomes 1 + 2^-8, a tie, and then 1."""
    tie = 1 + 2.0**-8
    values = [sign * (tie + by) * 2.0**power for sign in (1, -1) for by in (2.0**-40, -(2.0**-40)) for power in (0, 90)]
    values += [0.0, tie, -tie, 1.0, 3e-39, -1e-300, 3.38e38]
    values += torch.randn(2000, dtype=torch.float64).tolist()
    for dtype in DTYPES:
        assert all(is_nearest(nearest(torch.tensor(values, dtype=torch.float64), dtype), list(map(Fraction, values))))
    assert nearest(torch.tensor([1e39, -1e300], dtype=torch.float64), torch.bfloat16).tolist() == [
        float("inf"),
        -float("inf"),
    ]
    assert nearest(torch.tensor([float("nan")], dtype=torch.float64), torch.bfloat16).isnan().all()
