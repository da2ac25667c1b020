"""Weights on their way: nothing lost, nothing changed unnoticed, nothing fused torn apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sglang.buckets import Bucket, fill, fusion_key, pack, plan, transfer_order
from megatron_sglang.digests import digest


def tensors() -> list[tuple[str, torch.Tensor]]:
    base = torch.arange(35, dtype=torch.float32).view(5, 7) / 3
    return [
        ("a", base),
        ("b", base[:, :3].bfloat16()),
        ("c", base.t()),
        ("d", torch.tensor([1, 2, 3], dtype=torch.int64)),
    ]


def test_round_trip_keeps_names_shapes_dtypes_and_bits() -> None:
    """Odd sizes, other dtypes and strides must come out as they went in."""
    packed = pack(3, 1, tensors())
    received = Bucket.from_header(packed.header(), packed.data.clone())
    assert (received.version, received.index) == (3, 1)
    for (name, sent), (got_name, got), spec in zip(tensors(), received.tensors(), received.specs, strict=True):
        assert (got_name, got.shape, got.dtype) == (name, sent.shape, sent.dtype)
        assert torch.equal(got, sent)
        assert digest(got) == spec.digest


@settings(max_examples=200)
@given(length=st.integers(1, 70), data=st.data())
def test_any_flipped_bit_changes_the_digest(length: int, data: st.DataObject) -> None:
    """The whole proof of delivery stands on this."""
    original = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))
    changed = original.clone()
    changed[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(changed) != digest(original)


@given(first=st.integers(0, 15), second=st.integers(0, 15))
def test_swapped_words_change_the_digest(first: int, second: int) -> None:
    """A sum that ignores positions would miss rows written to each other's place."""
    original = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    swapped = original.clone()
    swapped[[first, second]] = original[[second, first]]
    assert (digest(swapped) == digest(original)) == (first == second)


def test_a_view_digests_as_its_copy() -> None:
    """Segments of a send buffer start anywhere; where the bytes lie must not matter."""
    buffer = torch.arange(40, dtype=torch.float32)
    for start in range(4):
        part = buffer[start : start + 17]
        assert digest(part) == digest(part.clone())


def test_trailing_zeros_and_emptiness_differ() -> None:
    digests = {digest(torch.zeros(size)) for size in range(5)}
    assert len(digests) == 5


@pytest.mark.parametrize("limit", [1, 16 << 10, 1 << 20, 1 << 30])
def test_a_plan_holds_every_name_once_and_fused_ones_together(limit: int) -> None:
    """SGLang's loader may drop half of a fused group when the other half is in another call."""
    projections = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
    experts = [f"mlp.experts.{e}.{x}_proj.weight" for e in range(12) for x in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{name}" for layer in range(11) for name in [*projections, *experts]]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    sizes = {name: 1000 + len(name) for name in names}
    buckets = plan(sizes, limit)
    assert sorted(name for bucket in buckets for name in bucket) == sorted(names)
    home = {name: index for index, bucket in enumerate(buckets) for name in bucket}
    for group in {fusion_key(name) for name in names}:
        assert len({home[name] for name in names if fusion_key(name) == group}) == 1, group
    for bucket in buckets:
        assert sum(sizes[name] for name in bucket) <= limit or len({fusion_key(name) for name in bucket}) == 1


def test_layers_come_in_their_order() -> None:
    """Layer 10 after layer 9: the exporter works layer by layer and must cut the same buckets as the plan."""
    names = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (10, 9, 0)] + ["lm_head.weight"]
    assert sorted(names, key=transfer_order) == ["lm_head.weight", names[2], names[1], names[0]]


def test_fill_is_lazy() -> None:
    """The exporter must not gather the whole model to send its first bucket."""
    seen: list[str] = []

    def stream():
        for name in "abcdef":
            seen.append(name)
            yield name, 10

    first = next(fill(stream(), lambda size: size, 20))
    assert [name for name, _ in first] == ["a", "b"]
    assert "".join(seen) == "abcd", "one group ahead, and the item that shows where that group ends"
