"""The records of a layout: coverage counts every element, folding loses nothing, problems are said once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.layout import Box, Param, RankLayout, Write, boxes_of, coverage, fold, problems, samples_of, unfold


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def elements(offset: int, size: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Element numbers of a strided view, the slow way."""
    indices = itertools.product(*map(range, size))
    return [offset + sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in indices]


def in_box(box: Box, param: Param) -> list[int]:
    offset = sum(at * stride for at, stride in zip(box.start, param.strides, strict=True))
    return elements(offset, box.size, param.strides)


@st.composite
def params(draw: st.DrawFn) -> Param:
    """Contiguous or with permuted axes, up to 3 of them."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    order = draw(st.permutations(range(len(shape))))
    strides = dict(zip(order, contiguous(tuple(shape[axis] for axis in order)), strict=True))
    return Param(shape, tuple(strides[axis] for axis in range(len(shape))), "float32")


@st.composite
def layouts_of_one(draw: st.DrawFn) -> tuple[Param, list[Write]]:
    """A parameter and any views of it: slices with steps, transposed, flattened."""
    param = draw(params())
    writes = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()) and param.strides == contiguous(param.shape):
            writes.append(Write("p", 0, (math.prod(param.shape),), (1,), const=0.0))
            continue
        offset, size, strides = 0, [], []
        for extent, stride in zip(param.shape, param.strides, strict=True):
            step = draw(st.integers(1, 2))
            start = draw(st.integers(0, extent - 1))
            offset += start * stride
            size.append(draw(st.integers(1, 1 + (extent - 1 - start) // step)))
            strides.append(stride * step)
        order = draw(st.permutations(range(len(size))))
        view = tuple(size[axis] for axis in order), tuple(strides[axis] for axis in order)
        writes.append(Write("p", offset, *view, const=0.0))
    return param, writes


@settings(max_examples=300)
@given(layouts_of_one())
def test_coverage_counts_every_element(case: tuple[Param, list[Write]]) -> None:
    """An element that is missed keeps an old version's value; one that is written twice depends on the order."""
    param, writes = case
    covered = coverage({"p": param}, writes)
    assert not covered.irregular
    count = Counter(e for write in writes for e in elements(write.offset, write.size, write.strides))
    everything = elements(0, param.shape, param.strides)
    uncovered = [element for box in covered.uncovered for element in in_box(box, param)]
    assert sorted(uncovered) == [element for element in sorted(everything) if not count[element]]
    surplus = Counter(element for box in covered.overlapping for element in in_box(box, param))
    assert surplus == Counter({element: n - 1 for element, n in count.items() if n > 1})


@settings(max_examples=300)
@given(layouts_of_one())
def test_boxes_are_the_elements_of_the_write(case: tuple[Param, list[Write]]) -> None:
    """Whoever cuts slices out of boxes must not send an element too many."""
    param, writes = case
    for write in writes:
        boxes = boxes_of(write, param)
        assert boxes is not None
        assert sorted(e for box in boxes for e in in_box(box, param)) == sorted(
            elements(write.offset, write.size, write.strides)
        )


def test_irregular_writes_are_told_apart() -> None:
    """A diagonal, a view that starts inside a row, or one past the end is no box, and must not count as coverage."""
    param = Param((4, 4), (4, 1), "float32")
    irregular = [
        Write("p", 0, (4,), (5,), const=0.0),
        Write("p", 2, (6,), (1,), const=0.0),
        Write("p", 12, (2, 4), (4, 1), const=0.0),
        Write("p", 16, (1,), (1,), const=0.0),
        Write("p", 0, (2, 2), (1, 1), const=0.0),
    ]
    covered = coverage({"p": param}, irregular)
    assert covered.irregular == set(irregular)
    assert covered.uncovered == (Box("p", (0, 0), (4, 4)),)


def expert_writes(layers: int, experts: int) -> list[Write]:
    """One rank (TP=2) of a MoE: gate and up of each expert in one parameter, down beside it."""
    writes = []
    for layer, expert in itertools.product(range(layers), range(experts)):
        base = f"model.layers.{layer}.mlp.experts."
        for at, part in enumerate(("gate", "up")):
            offset = expert * 512 + at * 256
            name = f"{base}{expert}.{part}_proj.weight"
            writes.append(Write(base + "w13_weight", offset, (8, 32), (32, 1), name, 256, (32, 1)))
        writes.append(
            Write(base + "w2_weight", expert * 256, (32, 8), (8, 1), f"{base}{expert}.down_proj.weight", 8, (16, 1))
        )
    return writes


def test_a_real_model_folds_to_a_few_entries() -> None:
    """The plan of 18,867 tensors must be small enough to send, print and read."""
    writes = expert_writes(48, 128)
    folds = fold(writes)
    assert len(folds) == 3
    assert sorted(map(repr, unfold(folds))) == sorted(map(repr, writes))
    assert {tuple(count for count, _ in part.axes) for part in folds} == {(48, 128)}


names = st.lists(st.sampled_from(["layers", "a", "0", "1", "2", "3", "10", "01", "w"]), min_size=1, max_size=5)
shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
sourced = st.builds(
    lambda param, source, offset, size, more: Write(param, offset, size, size, source, more, size, None, None),
    names.map(".".join),
    names.map(".".join),
    st.integers(0, 9),
    shapes,
    st.integers(0, 9),
)
constants = st.builds(
    lambda param, offset: Write(param, offset, (1,), (1,), const=0.0), names.map(".".join), st.integers()
)


@settings(max_examples=300)
@given(st.lists(sourced | constants, max_size=30))
def test_folding_is_lossless(writes: list[Write]) -> None:
    """A fold that generalised too much would fill weights from the wrong expert."""
    assert Counter(unfold(fold(writes))) == Counter(writes)


def test_json_keeps_everything() -> None:
    """The trainer must plan with what the engine has seen."""
    writes = (*expert_writes(2, 4), Write("norm", 0, (4,), (1,), const=0.0), Write("b", 0, (), (), "b", cast="float32"))
    layout = RankLayout(
        1,
        {"norm": Param((4,), (1,), "bfloat16")},
        writes,
        {"x": "computed"},
        ("kv",),
        {"head": "embedding"},
        (Box("norm", (0,), (4,)),),
        (Box("norm", (1,), (2,)),),
    )
    back = RankLayout.from_json(layout.to_json())
    assert Counter(back.writes) == Counter(writes)
    assert dataclasses.replace(back, writes=()) == dataclasses.replace(layout, writes=())
    assert json.loads(back.to_json()) == json.loads(layout.to_json())


def test_problems_are_said_once_and_by_rank() -> None:
    """The reason why the fast path is off must be readable, not 18,867 lines; under EP unused names are no reason."""
    param = {"w": Param((4,), (1,), "float32")}
    whole = [Write("w", 0, (4,), (1,), name, 0, (1,)) for name in ("a", "b")]
    ranks = [RankLayout(rank, param, (whole[rank],)) for rank in (0, 1)]
    assert problems(ranks, ["a", "b"]) == []
    assert all(layout.direct for layout in ranks)
    assert problems(ranks, ["a", "b", "c"]) == ["engine rank 0, 1: c is used by no rank: the loader does not know it"]
    bad = [
        RankLayout(
            rank, param, (), {"a": "computed"}, uncovered=(Box("w", (0,), (2,)),), overlapping=(Box("w", (2,), (1,)),)
        )
        for rank in (0, 1)
    ]
    assert problems(bad, ["a"]) == [
        "engine rank 0, 1: a needs the model's own loader: computed",
        "engine rank 0, 1: w[0:2] comes from no tensor",
        "engine rank 0, 1: w[2:3] is written more than once",
    ]
    assert not bad[0].direct


def test_records_refuse_nonsense() -> None:
    """Both a source and a const, or neither, would be replayed as one of them by chance."""
    with pytest.raises(ValueError, match="expected one"):
        Write("w", 0, (1,), (1,))
    with pytest.raises(ValueError, match="contains '#'"):
        fold([Write("w.#.x", 0, (1,), (1,), const=0.0)])


def test_samples_stand_for_each_kind_of_tensor() -> None:
    """The first layer may be dense, the last has the highest numbers; an engine rank may have the last experts only."""
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(12)]
    names += ["model.layers.0.mlp.up_proj.weight"]
    names += [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(1, 12) for e in range(10)]
    assert samples_of(names) == [
        ["model.embed_tokens.weight"],
        ["lm_head.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"],
        [
            "model.layers.11.self_attn.q_proj.weight",
            "model.layers.11.mlp.experts.0.up_proj.weight",
            "model.layers.11.mlp.experts.9.up_proj.weight",
        ],
    ]
