"""The tracer against small loaders that do what real ones do, or could: what it records must replay bit-exactly, and
what it cannot follow it must call generic. Never may it change the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_sglang.buckets import pack
from megatron_sglang.engine import loader, wire
from megatron_sglang.engine.element_ids import affine_boxes
from megatron_sglang.engine.options import MAILBOX_VARIABLE
from megatron_sglang.engine.self_test import self_test
from megatron_sglang.engine.trace_loader import trace
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.layout import RankLayout, Write, problems

Weights = dict[str, torch.Tensor]
Load = Callable[[nn.Parameter, Weights], None]


class Model(nn.Module):
    """One parameter `w`, and a loader made of one line."""

    def __init__(self, load: Load, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.load(self.w, dict(weights))


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in zip("abc", shapes, strict=False)}


def traced(model: nn.Module, weights: Weights) -> RankLayout:
    return trace(model, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}, 0)


def fill_a_temporary(p: nn.Parameter, d: Weights) -> None:
    temporary = torch.empty_like(d["a"].repeat(2, 1))
    temporary[:8] = d["a"]
    temporary[8:].copy_(d["b"])
    p.copy_(temporary)


def in_a_pool(p: nn.Parameter, d: Weights) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: p.data[2:].copy_(d["a"][:6])).result()
        pool.submit(lambda: p.data[:2].fill_(0)).result()


def slices(p: nn.Parameter, d: Weights) -> None:
    p[1:3] = d["a"][4:6]
    p[3:9] = d["a"][0:6]
    p[0] = 0


def blank_first(p: nn.Parameter, d: Weights) -> None:
    d["a"].narrow(0, 0, 2).zero_()
    p.copy_(d["a"])


A = (8, 6)
EXACT: dict[str, tuple[Load, tuple[int, ...], Weights, int]] = {
    "copy": (lambda p, d: p.copy_(d["a"]), A, tensors(A), 1),
    "slice of a shard": (lambda p, d: p.data.copy_(d["a"].narrow(0, 4, 4)), (4, 6), tensors(A), 1),
    "transposed": (lambda p, d: p.copy_(d["a"].t().contiguous()), (6, 8), tensors(A), 1),
    "flat": (lambda p, d: p.view(-1).copy_(d["a"].flatten()), A, tensors(A), 1),
    "every other row": (lambda p, d: (p[::2].copy_(d["a"]), p[1::2].copy_(d["b"])), (16, 6), tensors(A, A), 2),
    "cat": (lambda p, d: p.copy_(torch.cat([d["a"], d["b"]])), (16, 6), tensors(A, A), 2),
    "part of a cat": (lambda p, d: p.copy_(torch.cat([d["a"], d["b"]], 1)[2:6, 1:9]), (4, 8), tensors(A, A), 2),
    "stack": (lambda p, d: p.copy_(torch.stack([d["a"], d["b"]])), (2, 8, 6), tensors(A, A), 2),
    "interleaved": (lambda p, d: p.copy_(torch.stack([d["a"], d["b"]], 1).reshape(16, 6)), (16, 6), tensors(A, A), 16),
    "rope": (
        lambda p, d: p.copy_(d["a"].view(2, 2, 4, 6).transpose(1, 2).reshape(16, 6)),
        (16, 6),
        tensors((16, 6)),
        8,
    ),
    "index": (lambda p, d: p.copy_(d["a"][torch.tensor([3, 1, 0, 2])]), (4, 6), tensors(A), 3),
    "flip": (lambda p, d: p.copy_(d["a"].flip(0)), A, tensors(A), 8),
    "pad": (lambda p, d: p.copy_(nn.functional.pad(d["a"], (0, 0, 0, 2))), (10, 6), tensors(A), 2),
    "zeros behind": (lambda p, d: p.copy_(torch.cat([d["a"], torch.zeros(2, 6)])), (10, 6), tensors(A), 2),
    "temporary": (fill_a_temporary, (16, 6), tensors(A, A), 2),
    "number": (lambda p, d: p.fill_(d["a"].item()), (3,), tensors((1,)), 1),
    "broadcast": (lambda p, d: p.copy_(d["a"]), (4, 6), tensors((6,)), 1),
    "thread pool": (in_a_pool, A, tensors(A), 2),
    "slices": (slices, (9, 6), tensors(A), 3),
    "cast": (lambda p, d: p.copy_(d["a"].to(torch.float32)), A, tensors(A, dtype=torch.bfloat16), 1),
    "in place on the tensor": (blank_first, A, tensors(A), 2),
    "foreach": (lambda p, d: torch._foreach_copy_([p[:8], p[8:]], [d["a"], d["b"]]), (16, 6), tensors(A, A), 2),
    "moved": (lambda p, d: p.copy_(d["a"].cpu().to(p.device)), A, tensors(A), 1),
    "onto itself": (lambda p, d: (p.copy_(d["a"]), p[2:].copy_(p[2:]))[0], A, tensors(A), 1),
    "own data": (lambda p, d: (setattr(p, "data", p.data), p.copy_(d["a"])), A, tensors(A), 1),
}


@pytest.mark.parametrize("case", EXACT)
def test_recorded_writes_do_what_the_loader_does(case: str) -> None:
    """A write recorded wrongly would fill weights with others of the right shape: nobody would notice but the model."""
    load, shape, weights, writes = EXACT[case]
    model = Model(load, *shape)
    before = model.w.clone()
    layout = traced(model, weights)
    assert torch.equal(model.w, before)
    assert layout.direct, problems([layout], weights)
    assert len(layout.writes) == writes
    assert set(RankLayout.from_json(layout.to_json()).writes) == set(layout.writes)
    assert self_test(model, weights, 0)["generic"] == 0


def plain_temporary(p: nn.Parameter, d: Weights) -> None:
    temporary = torch.empty(16, 6)
    temporary[:8] = d["a"]
    temporary[8:] = d["b"]
    p.copy_(temporary)


GENERIC: dict[str, tuple[Load, tuple[int, ...], Weights, str]] = {
    "scaled": (lambda p, d: p.copy_(d["a"] * 2), A, tensors(A), "computed by aten.mul"),
    "added": (lambda p, d: p.add_(d["a"]), A, tensors(A), "aten.add_ on parameter w"),
    "changed after": (lambda p, d: p.copy_(d["a"]).add_(1), A, tensors(A), "aten.add_ on parameter w"),
    "decided": (
        lambda p, d: p.copy_(d["a"] if bool((d["a"] != 0).any()) else d["a"].flip(0)),
        A,
        tensors(A),
        "decides",
    ),
    "number elsewhere": (lambda p, d: (p.copy_(d["b"]), d["a"].item())[0], A, tensors((1,), A), "reads its value"),
    "plain temporary": (plain_temporary, (16, 6), tensors(A, A), "a tensor that is no parameter"),
    "rebound": (lambda p, d: setattr(p, "data", d["a"].clone()), A, tensors(A), "replaces the memory of w"),
    "by way of bf16": (lambda p, d: p.copy_(d["a"].bfloat16()), A, tensors(A), "another dtype"),
    "bits": (lambda p, d: p.view(torch.int32).copy_(d["a"].view(torch.int32)), A, tensors(A), "another dtype"),
    "reinterpreted": (lambda p, d: p.copy_(d["a"].view(torch.int32)), A, tensors(A), "its bits for another dtype"),
    "diagonal": (lambda p, d: p.diagonal().copy_(d["a"]), (4, 4), tensors((4,)), "irregular"),
    "own old value": (lambda p, d: p.copy_(d["a"] + p), A, tensors(A), "computed by aten.add"),
}


@pytest.mark.parametrize("case", GENERIC)
def test_what_cannot_be_followed_is_generic(case: str) -> None:
    """The fast path would leave out the arithmetic; and each reason must be one a person can act on."""
    load, shape, weights, reason = GENERIC[case]
    model = Model(load, *shape)
    before = model.w.clone()
    layout = traced(model, weights)
    assert torch.equal(model.w, before)
    assert not layout.direct
    assert reason in layout.generic["a"]
    assert "a" not in {write.source for write in layout.writes}


def test_overlaps_and_gaps_are_found() -> None:
    """Of overlapping writes the last one counts, which a plan without order cannot say; a gap keeps old values."""
    model = Model(lambda p, d: (p.copy_(d["b"]), p[:4].copy_(d["a"][:4]))[0], *A)
    layout = traced(model, tensors(A, A))
    assert [str(box) for box in layout.overlapping] == ["w[0:4, 0:6]"]
    gap = traced(Model(lambda p, d: p[2:].copy_(d["a"][2:]), *A), tensors(A))
    assert [str(box) for box in gap.uncovered] == ["w[0:2, 0:6]"]
    assert not layout.direct
    assert not gap.direct


def test_unknown_names_are_no_secret() -> None:
    """Loaders skip names they do not know without a word."""
    weights = tensors(A, A)
    layout = traced(Model(lambda p, d: p.copy_(d["a"]), *A), weights)
    assert problems([layout], weights) == ["engine rank 0: b is used by no rank: the loader does not know it"]


def sneak(p: nn.Parameter, d: Weights) -> None:
    p.copy_(d["a"])
    p.numpy()[0] = 7


def replaced(p: nn.Parameter, d: Weights) -> None:
    p.data = p.data.reshape(6, 8)


@pytest.mark.parametrize(("load", "message"), [(sneak, "changed 1 tensors"), (replaced, "replaces the memory")])
def test_a_loader_that_changes_the_model_is_refused(load: Load, message: str) -> None:
    """Some loaders reshape parameters or write where no trace sees it: the live engine would serve the result."""
    model = Model(load, *A)
    with pytest.raises(ValueError, match=message):
        traced(model, tensors(A))
    assert model.w.shape == A


def test_parameters_put_in_by_the_loader_are_taken_out_again() -> None:
    """A parameter without memory in a live model would end the process at the next forward."""
    model = Model(lambda p, d: None, *A)
    model.load = lambda p, d: setattr(model, "w", nn.Parameter(d["a"], requires_grad=False))
    before = model.w
    layout = traced(model, tensors(A))
    assert model.w is before
    assert not layout.direct


class Latent(nn.Module):
    """As DeepSeek's attention: the loader derives `half` from the parameter, and has a hook to do it again."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Parameter(torch.randn(4, 2), requires_grad=False)
        self.half = torch.zeros(2, 2)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.kv.copy_(tensor)
        self.post_load_weights()

    def post_load_weights(self) -> None:
        self.half = self.kv[:2] * 2


def test_derived_state_is_named_and_refreshed() -> None:
    """Replayed parameters with the old derived state are two models in one."""
    model, weights = Latent(), tensors((4, 2))
    layout = traced(model, weights)
    assert layout.direct
    assert layout.derived == ("kv",)
    assert self_test(model, weights, 0)["refreshed"] == 1
    assert torch.equal(model.half, weights["a"][:2] * 2)
    hookless = Model(lambda p, d: p.copy_(d["a"]).sum(), *A)
    assert "no hook" in traced(hookless, tensors(A)).generic["a"]


class Tied(nn.Module):
    """As SGLang's MoE models: tied by configuration, not by memory; beside it one really shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(6, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.again = self.model.embed_tokens
        self.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.model.embed_tokens.weight[:5].copy_(tensor)
            self.model.embed_tokens.weight[5:].zero_()


def test_tied_heads_are_written_and_aliases_named() -> None:
    """Our loader copies the embedding into such a head; a plan without it would leave the head random."""
    model, weights = Tied(), {"model.embed_tokens.weight": torch.randn(5, 4)}
    layout = traced(model, weights)
    assert layout.direct
    assert layout.aliases == {"again.weight": "model.embed_tokens.weight"}
    assert {(write.param, write.const) for write in layout.writes} == {
        ("model.embed_tokens.weight", None),
        ("model.embed_tokens.weight", 0.0),
        ("lm_head.weight", None),
        ("lm_head.weight", 0.0),
    }
    self_test(model, weights, 0)


def test_self_test_sees_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that passes whatever the layout says is worse than none."""
    model, weights = Model(lambda p, d: (p[:8].copy_(d["a"]), p[8:].copy_(d["b"]))[0], 16, 6), tensors(A, A)
    layout = traced(model, weights)
    crossed = tuple(
        Write(w.param, 48 - w.offset, w.size, w.strides, w.source, 0, w.source_strides) for w in layout.writes
    )
    wrong = RankLayout(0, layout.params, crossed)
    monkeypatch.setattr("megatron_sglang.engine.self_test.trace", lambda *_: wrong)
    with pytest.raises(ValueError, match="differs from the loader in 1 of 1 tensors, first w"):
        self_test(model, weights, 0)


def test_meta_models_can_be_traced() -> None:
    """The layout of a model that does not fit in memory, from its shapes alone."""
    with torch.device("meta"):
        model = Model(lambda p, d: (p[:1000].copy_(d["a"].float()), p[1000:].copy_(d["b"][7:]))[0], 1_000_000, 100_000)
    shapes = {"a": (1000, 100_000), "b": (999_007, 100_000)}
    layout = trace(model, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 0)
    assert layout.direct
    assert [write.cast for write in layout.writes] == ["float32", "float32"]


def test_numbering_gives_up_on_noise() -> None:
    """A permutation without pattern would become a plan larger than the weights."""
    assert affine_boxes(torch.randperm(9000)) is None


def ask(model: Any, mailbox: Path, command: str, weights: Weights) -> dict[str, Any]:
    bucket = pack(0, 0, list(weights.items()))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    message = {"id": 1, "rank": 0, "command": command, "dtype": "float32", "shapes": shapes, "bucket": bucket.header()}
    loader.load(model, [(json.dumps(message), bucket.data)])
    return wire.collect(mailbox, 1, 1, command)[0]


def test_loader_answers_with_layout_and_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts of real models are large: they must get through the mailbox, compressed, and errors as text."""
    monkeypatch.setenv(MAILBOX_VARIABLE, str(tmp_path))
    order = torch.randperm(2000).tolist()
    model, weights = Model(lambda p, d: p.copy_(d["a"][order]), 2000, 6), tensors((2000, 6))
    layout = RankLayout.from_json(ask(model, tmp_path, "layout", weights)["layout"])
    assert layout.direct
    assert len(layout.to_json()) > 1 << 16
    assert ask(model, tmp_path, "self_test", weights)["report"]["tensors"] == 1
    with pytest.raises(WeightSyncError, match="engine rank 0: the loader replaces the memory"):
        ask(Model(replaced, *A), tmp_path, "layout", tensors(A))
    with pytest.raises(WeightSyncError, match="object has no layout"):
        ask(object(), tmp_path, "layout", tensors(A))
    assert list(tmp_path.iterdir()) == []
