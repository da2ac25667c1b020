"""Folded copies move exactly what the rectangles say, and are few where memory is regular."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.copies import Rectangle, fold

WIDTH = 12
"""Of the matrices that rectangles are cut from; they have 12 rows."""


@st.composite
def rectangles(draw: st.DrawFn) -> list[Rectangle]:
    """In two tensors, some evenly spaced, some overlapping (reading may), in any order, some of them transposed."""
    found: list[Rectangle] = []
    for _ in range(draw(st.integers(1, 6))):
        rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        count, row_step = draw(st.integers(1, 4)), draw(st.integers(0, 2))
        col, tensor = draw(st.integers(0, WIDTH - cols)), draw(st.sampled_from(["a", "b"]))
        for number in range(count):
            offset = number * row_step * WIDTH + col
            found.append(
                (tensor, offset, rows, cols, WIDTH, 1)
                if draw(st.booleans())
                else (tensor, offset, cols, rows, 1, WIDTH)
            )
    return draw(st.permutations(found))


@settings(max_examples=200)
@given(rectangles())
def test_a_fold_moves_what_its_rectangles_say(given_rectangles: list[Rectangle]) -> None:
    """Order included: the other side cuts the flat segment by its own rectangles of the same sizes."""
    memory = {name: torch.arange(start, start + 12 * WIDTH) for name, start in (("a", 0), ("b", 1000))}
    expected = torch.cat(
        [
            memory[tensor].as_strided((rows, cols), (down, right), offset).reshape(-1)
            for tensor, offset, rows, cols, down, right in given_rectangles
        ]
    )
    flat = torch.full_like(expected, -1)
    for copy in fold(given_rectangles):
        copy.of_flat(flat).copy_(copy.of(memory[copy.tensor]))
    assert torch.equal(flat, expected)


def test_a_layer_of_experts_is_one_copy_on_each_side() -> None:
    """16 experts, TP 8: gate and up rows of 96 x 2048, out of fused matrices of 1536 rows; the engine keeps its slices
    of all experts in one parameter. Copied one by one these would be 32 launches for each layer and target."""
    hidden, half, part, target = 2048, 768, 96, 3
    here, there = [], []
    for expert in range(16):
        for number in range(2):
            row = expert * 2 * half + number * half + target * part
            here.append(("fc1", row * hidden, part, hidden, hidden, 1))
            there.append(("w13", (expert * 2 + number) * part * hidden, part, hidden, hidden, 1))
    (source,), (goal,) = fold(here), fold(there)
    assert source.sizes == (32, part * hidden)
    assert source.strides == (half * hidden, 1)
    assert (goal.sizes, goal.strides) == ((32 * part * hidden,), (1,))


def test_columns_stay_strided() -> None:
    """down_proj is cut by columns: rows of 96 out of 768, for all experts at once."""
    hidden, wide, part = 2048, 768, 96
    (copy,) = fold([("fc2", expert * hidden * wide + 5 * part, hidden, part, wide, 1) for expert in range(16)])
    assert (copy.sizes, copy.strides) == ((16 * hidden, part), (wide, 1))
