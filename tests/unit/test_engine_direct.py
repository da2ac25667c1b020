"""The direct path inside an engine rank, on a small torch module: what is written, what is refused, what is derived."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sglang.digests import digest
from megatron_sglang.engine import direct


class Model(torch.nn.Module):
    """A fused 4 x 3 parameter with a row of padding, and state that a hook derives from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = torch.nn.Parameter(torch.full((4, 3), torch.nan))
        self.doubled = torch.zeros(3)

    def post_load_weights(self) -> None:
        self.doubled = self.fused.detach().sum(0) * 2


ROWS = [("fused", 0, 0, (3,), (1,), (1,)), ("fused", 3, 3, (2, 3), (3, 1), (3, 1))]
"""(parameter, offset, place in the delivery, sizes, strides, strides in the delivery)."""
PADDING = [(("fused", 9, 0, (3,), (1,), (0,)), 0.0)]


def plan(buckets: Any = (ROWS,), constants: Any = PADDING) -> direct.Plan:
    return direct.check(Model(), {"buckets": buckets, "constants": constants})


def message(flat: torch.Tensor, lengths: list[int]) -> dict[str, Any]:
    return {"dtype": "float32", "lengths": lengths, "digests": [digest(part) for part in flat.split(lengths)]}


def test_rectangles_padding_and_derived_state_are_written() -> None:
    """A segment of each source, in order; what nobody sends is filled in by the engine."""
    model, flat = Model(), torch.arange(1.0, 10.0)
    live = direct.Live(model)
    direct.deliver(live, plan(), 0, message(flat, [3, 6, 0]), flat.view(torch.uint8))
    assert direct.finish(live, plan()).parameters.keys() == {"fused"}
    assert torch.equal(model.fused, torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]))
    assert torch.equal(model.doubled, torch.tensor([24.0, 30.0, 36.0]))


class Tied(torch.nn.Module):
    """A head tied by configuration only, and a router whose cast the engine keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(3, 2)
        self.model.router = torch.nn.Linear(2, 2, bias=False)
        self.model.router.register_buffer("_weight_fp32", None, persistent=False)
        self.lm_head = torch.nn.Linear(2, 3, bias=False)


def test_what_follows_the_parameters_is_found_for_each_version() -> None:
    """The cast is there from the first forward on, which may be after the first version."""
    model: Any = Tied()
    names = ("model.embed_tokens.weight", "model.router.weight", "lm_head.weight")
    rows = [(name, 0, at, (size,), (1,), (1,)) for name, at, size in zip(names, (0, 6, 10), (6, 4, 6), strict=True)]
    checked = direct.check(model, {"buckets": [rows], "constants": []})
    cast = None
    for version in (1.0, 2.0, 3.0):
        live, flat = direct.Live.by(checked, model), torch.arange(16.0) * version
        direct.deliver(live, checked, 0, message(flat, [16]), flat.view(torch.uint8))
        live = direct.finish(live, checked)
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert torch.equal(model.model.router.weight, (torch.arange(6.0, 10) * version).view(2, 2))
        assert cast is None or torch.equal(cast, model.model.router.weight)
        by_name = sorted(model.named_parameters(), key=lambda one: one[0])
        assert direct.prove(live, checked)[0] == [digest(parameter) for _, parameter in by_name]
        if version == 1.0:
            cast = model.model.router._weight_fp32 = model.model.router.weight.data.clone()
    assert model.model.router._weight_fp32 is cast, "a CUDA graph reads it where it was"


def test_what_a_hook_puts_in_place_is_what_is_proved() -> None:
    """A model that packs its weights after loading serves from other memory than the deliveries were written to."""
    model, checked, flat = Model(), plan(), torch.arange(1.0, 10.0)

    def pack() -> None:
        model.fused = torch.nn.Parameter(model.fused.detach().flip(0))

    model.post_load_weights = pack
    for _ in range(2):
        live = direct.Live(model)
        direct.deliver(live, checked, 0, message(flat, [9]), flat.view(torch.uint8))
        live = direct.finish(live, checked)
        assert direct.prove(live, checked) == ([digest(model.fused)], [True])


def test_what_proves_the_parameters_is_laid_out_again_when_they_are_others() -> None:
    """Else memory that nobody serves from would be digested, and found to be right."""
    model, checked = Model(), plan()
    for value, finite in ((1.0, True), (torch.nan, False), (2.0, True)):
        model.fused.data.fill_(value)
        assert direct.prove(direct.Live(model), checked) == ([digest(model.fused)], [finite])
    kept = checked.proof
    direct.prove(direct.Live(model), checked)
    assert checked.proof is kept
    model.fused = torch.nn.Parameter(torch.full((4, 3), 3.0))
    assert direct.prove(direct.Live(model), checked) == ([digest(model.fused)], [True])
    assert checked.proof is not kept


def test_changed_bytes_touch_no_parameter() -> None:
    """The digest is compared before anything is written."""
    model, flat = Model(), torch.arange(1.0, 10.0)
    sent = message(flat, [9])
    flat[4] = -5.0
    with pytest.raises(ValueError, match=r"delivery 0, part of trainer rank 0, for fused: arrived with digest"):
        direct.deliver(direct.Live(model), plan(), 0, sent, flat.view(torch.uint8))
    assert model.fused.isnan().all()


def test_only_the_parameters_of_the_changed_part_are_named() -> None:
    """Two parameters, three sources: the second source's part ends in the middle of the second parameter."""
    model = torch.nn.ParameterDict({"first": torch.zeros(2, 2), "second": torch.zeros(2, 2), "third": torch.zeros(2)})
    flat = torch.arange(1.0, 11.0)
    copies = [("first", 0, 0, (2, 2), (2, 1), (2, 1)), ("second", 0, 4, (4,), (1,), (1,))]
    copies.append(("third", 0, 8, (2,), (1,), (1,)))
    checked = direct.check(model, {"buckets": [copies], "constants": []})
    for lengths, at, named in (([4, 6], 3, "first"), ([6, 4], 5, "first, second"), ([6, 4], 6, "second, third")):
        sent = message(flat, lengths)
        changed = flat.clone()
        changed[at] = -5.0
        with pytest.raises(ValueError, match=rf"trainer rank {int(at >= lengths[0])}, for {named}: arrived with"):
            direct.deliver(direct.Live(model), checked, 0, sent, changed.view(torch.uint8))


def test_a_parameter_that_does_not_keep_the_bytes_is_noticed() -> None:
    """Read back: a parameter of a narrower dtype, say, would serve other weights than the trainer has."""
    model, flat = Model(), torch.arange(1.0, 10.0) / 3
    model.fused.data = model.fused.data.bfloat16()
    with pytest.raises(ValueError, match=r"reads back from the parameters as digest"):
        direct.deliver(direct.Live(model), plan(), 0, message(flat, [9]), flat.view(torch.uint8))


def test_a_parameter_that_the_plan_does_not_know_is_noticed() -> None:
    """That every element is written was proved for the parameters of then; nothing else would tell what is left out."""
    model, checked = Model(), plan()
    assert direct.Live.by(checked, model).parameters.keys() == {"fused"}
    model.fused = torch.nn.Parameter(torch.zeros(4, 3))  # another object, filled by each version like the one before
    direct.Live.by(checked, model)
    model.fused = torch.nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"parameter fused is another one .*: \(\(5, 3\), .*expected .*\(4, 3\)"):
        direct.Live.by(checked, model)
    model.fused = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"torch.float16.*expected .*torch.float32"):
        direct.Live.by(checked, model)
    model.fused = torch.nn.Parameter(torch.zeros(4, 3))
    model.later = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="parameter later is another one"):
        direct.Live.by(checked, model)


def test_a_parameter_keeps_its_number_when_the_model_counts_anew() -> None:
    """What a kernel was told of a delivery names parameters by number, and the digests would be those of the wrong one
    on both ways."""
    model = Model()
    model.other = torch.nn.Parameter(torch.zeros(2))
    before, fused = direct.Live(model).numbers, model.fused
    del model.fused
    model.fused = fused
    assert [name for name, _ in model.named_parameters()] == ["other", "fused"]
    assert direct.Live(model).numbers == before == {"fused": 0, "other": 1}


@pytest.mark.parametrize(
    ("buckets", "constants", "text"),
    [
        ((ROWS[:1],), PADDING, "leaves 6 elements of fused unwritten and writes 0"),
        ((ROWS, ROWS[:1]), PADDING, "leaves 0 elements of fused unwritten and writes 3"),
        ((ROWS,), [], "leaves 3 elements"),
        (([*ROWS, ("other", 0, 0, (1,), (1,), (1,))],), PADDING, "other, which is no parameter"),
    ],
)
def test_a_plan_must_write_each_element_once(buckets: Any, constants: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan(buckets, constants)
