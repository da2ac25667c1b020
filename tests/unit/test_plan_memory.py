"""Peak memory by phase, by hand for a model that fits on a page, and what the flagship's presets come to."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sglang.placement import Placement
from megatron_sglang.plan import memory
from megatron_sglang.plan.memory import GUESSES, KEPT, KEPT_WHOLE, Job
from megatron_sglang.plan.shapes import heads, hub_shapes
from megatron_sglang.plan.trainer import Trainer

ROOT = Path(__file__).parents[2]
EXPERTS_FROM_32 = re.compile(r"\.experts\.(3[2-9]|[4-9]\d|\d{3})\.")
LAYER = "model.layers.{}."
DENSE = {"self_attn.q_proj": (16, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8)}
DENSE |= {"self_attn.o_proj": (8, 16), "mlp.gate": (4, 8)}
EXPERT = {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
JOB = Job(micro_batch=2, sequence=10, lora_rank=2, experts_per_token=2, mem_fraction=0.5, device_bytes=1000)


def small_model() -> dict[str, tuple[int, ...]]:
    """Two layers of width 8 with 4 experts, 2 heads of 8 with one key-value head, 20 words."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8)}
    for layer in range(2):
        prefix = LAYER.format(layer)
        found |= {f"{prefix}{name}.weight": shape for name, shape in DENSE.items()}
        for expert in range(4):
            found |= {f"{prefix}mlp.experts.{expert}.{name}.weight": shape for name, shape in EXPERT.items()}
    return found


def peaks(job: Job = JOB, buffers: int = 0, engine: bool = True, **sizes: int) -> list[memory.Peaks]:
    placement = Placement(**sizes)  # type: ignore[arg-type]
    trainer = Trainer(small_model(), (2, 1), placement)
    return memory.peaks_of(small_model(), trainer, job, [buffers] * placement.world_size, engine)


def test_one_rank_by_hand() -> None:
    """Weights in bf16; LoRA 2 beside q/k/v, o, gate/up and down; not beside the router."""
    trained = peaks(world_size=1)[0].trained
    dense, expert = (16 + 8 + 8) * 8 + 8 * 16, 2 * 6 * 8 + 8 * 6
    assert trained.weights == 2 * (2 * 20 * 8 + 2 * (dense + 4 * 8 + 4 * expert))
    qkv, o, gate_up, down = 2 * (8 + 32), 2 * (16 + 8), 2 * (8 + 12), 2 * (6 + 8)
    adapters = 2 * (qkv + o + 4 * (gate_up + down))
    assert (trained.adapters, trained.gradients) == (2 * adapters, 4 * adapters)
    assert (trained.main, trained.adam) == (4 * adapters, 8 * adapters)
    tokens = 20
    inputs = 2 * tokens * 8 * 2
    layer = tokens * (2 * (16 + 8 + 8 + 8) + 4 * 8 + 2 * (2 * (6 + 6 + 8) + 8 + 8 + 6)) * 2
    assert (trained.inputs, trained.layer) == (inputs, 2 * layer)
    assert trained.logits == 3 * tokens * 20 * 2
    assert trained.passing == inputs + max(2 * layer, trained.logits)
    alone = peaks(replace(JOB, micro_batch=1), world_size=1)[0].trained
    assert alone.logits == 2 * tokens // 2 * 20 * 2, "one sequence's gradient is not put in another order"


def test_layers_that_are_not_recomputed_keep_what_they_made() -> None:
    """By hand: norms, attention, two experts of a token, what each A makes; the other layer keeps its input only."""
    [none], [one], [both] = (peaks(replace(JOB, recomputed=number), world_size=1) for number in (0, 1, 5))
    attention, experts, adapters = 2 * (16 + 8 + 8) + 16, 2 * (8 + 6 + 6 + 6 + 8), 2 * (2 + 2 * 2)
    each = 20 * (4 * 8 + attention + experts + adapters) * 2
    assert (none.trained.kept, none.trained.inputs) == (2 * each, 0)
    assert (one.trained.kept, one.trained.inputs) == (each, 20 * 8 * 2)
    assert both == peaks(world_size=1)[0], "a stage has no more layers than it has"
    assert one.trained.passing == 20 * 8 * 2 + each + max(one.trained.layer, one.trained.logits)
    for found in (none, one):
        step, rest = found.trainer["train"], found.device["train"] - found.device["rollout"] + JOB.device_bytes // 2
        moving = found.trained.passing - found.trained.kept
        held = max(step - found.trained.kept + KEPT["train"] * moving, (1 + KEPT_WHOLE) * step)
        assert rest == int(held) - int(found.trainer["rollout"] + KEPT["rollout"] * moving)
    assert "1 layers recomputed" in memory.as_text([one], replace(JOB, recomputed=1))[0]


def test_the_plan_is_what_a_train_step_took_on_a_gpu() -> None:
    """Peaks of tensors with 0 to 48 layers recomputed, in two sizes of micro-batches; a preset rests on it."""
    measured = json.loads((ROOT / "benchmarks/results/recompute_h200_2.json").read_text())["settings"]
    shapes = hub_shapes(ROOT / "examples/qwen3_30b_a3b")
    fewer = {name: shape for name, shape in shapes.items() if not EXPERTS_FROM_32.search(name)}
    trainer = Trainer(fewer, heads(ROOT / "examples/qwen3_30b_a3b"), Placement(world_size=2, ep=2))
    compared = [one for one in measured if "allocated_peak_gb" in one]
    assert len(compared) == 8
    for one in compared:
        job = Job(1, one["tokens_of_a_micro_batch"], experts_per_token=8, recomputed=one["layers_recomputed"])
        planned = memory.peaks_of(fewer, trainer, job, [0, 0])[0].trainer["train"] / memory.GB
        assert planned == pytest.approx(one["allocated_peak_gb"], rel=0.06), one


def test_the_plan_is_what_the_flagship_took() -> None:
    """Within 10 % by medians, in every phase of four runs; the committed comparison is today's plan."""
    committed = json.loads((ROOT / "benchmarks/results/memory_check.json").read_text())["rows"]
    found = runpy.run_path(str(ROOT / "benchmarks/memory_check.py"))["rows"]()
    assert len(found) == 4 * 4 * 2
    for row, before in zip(found, committed, strict=True):
        assert abs(row["off"]) < 0.1, row
        assert row["planned_gb"] == pytest.approx(before["planned_gb"])


def test_ranks_share_experts_and_optimizer() -> None:
    """EP 2 over two data-parallel ranks: half the experts each, whose optimizer nobody shares; the rest's is halved."""
    whole, half = peaks(world_size=1)[0].trained, peaks(world_size=2, ep=2)[0].trained
    experts = 2 * 4 * (2 * (8 + 12) + 2 * (6 + 8))
    dense = whole.gradients // 4 - experts
    assert half.gradients == 4 * (dense + experts // 2)
    assert half.main == 4 * (dense // 2 + experts // 2)
    assert half.weights == whole.weights - 2 * 2 * 2 * (2 * 6 * 8 + 8 * 6)
    assert (half.inputs, half.layer, half.logits) == (whole.inputs, whole.layer, whole.logits)


def test_pipeline_stages_differ() -> None:
    """The first has more micro-batches in flight, the last the logits."""
    first, last = (one.trained for one in peaks(world_size=2, pp=2))
    assert first.logits == 0 < last.logits
    assert first.inputs - last.inputs == 20 * 8 * 2, "one more input of one layer"


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ({"world_size": 1}, [0]),
        ({"world_size": 2, "ep": 2}, [0, 0]),
        ({"world_size": 2, "pp": 2}, [0, 20 * 8]),
        ({"world_size": 2, "tp": 2}, [0, 0]),
        ({"world_size": 4, "tp": 2, "pp": 2}, [0, 0, 10 * 8, 10 * 8]),
        ({"world_size": 4, "pp": 2, "ep": 2}, [0, 0, 20 * 8, 20 * 8]),
    ],
)
def test_a_tied_head_is_a_copy_on_the_last_of_several_stages(sizes: dict[str, Any], copies: list[int]) -> None:
    """Megatron allocates it there, split as the embedding is. No update takes anything from it, so no shard is one."""
    two_groups = {LAYER.format(layer) + f"self_attn.{part}_proj.weight": (16, 8) for layer in (0, 1) for part in "kv"}
    untied = small_model() | two_groups
    tied = {name: shape for name, shape in untied.items() if name != "lm_head.weight"}
    placement = Placement(**sizes)
    for shapes, expected in ((tied, copies), (untied, [0] * placement.world_size)):
        trainer = Trainer(shapes, (2, 2), placement)
        planned = memory.peaks_of(shapes, trainer, JOB, [0] * placement.world_size)
        held = [sum(shard.box.size for shard in trainer.of(rank)) for rank in range(placement.world_size)]
        found = [peak.trained.weights // JOB.itemsize - size for peak, size in zip(planned, held, strict=True)]
        assert found == expected


def test_phases_add_what_is_there_at_that_time() -> None:
    """The engine's share counts while it serves, and while it trains only where it is not given back."""
    [found] = peaks(buffers=7, world_size=1)
    trained, overhead = found.trained, 2 * GUESSES["context"] + GUESSES["graphs"]
    standing = trained.weights + trained.adapters + trained.gradients + trained.main + trained.adam
    assert trained.standing == standing
    assert found.trainer == {
        "build": standing - trained.adam,
        "train": standing + trained.passing,
        "sync": standing + 7,
        "rollout": standing,
    }
    held = {phase: int(size + KEPT[phase] * found.trained.passing) for phase, size in found.trainer.items()}
    assert {phase: found.device[phase] - held[phase] - overhead for phase in found.device} == {
        "build": 0, "train": 0, "sync": 500, "rollout": 500
    }  # fmt: skip
    [kept] = peaks(replace(JOB, releases=False), world_size=1)
    assert kept.device["train"] - found.device["train"] == 500
    [alone] = peaks(engine=False, world_size=1)
    assert alone.device["rollout"] == held["rollout"] + GUESSES["context"]
    several = peaks(engine=False, world_size=2)[0]
    held_there = int(several.trainer["rollout"] + KEPT["rollout"] * several.trained.passing)
    assert several.device["rollout"] == held_there + GUESSES["context"] + GUESSES["nccl"]


@pytest.mark.parametrize("sizes", [{"world_size": 1}, {"world_size": 2, "ep": 2}])
def test_text_says_what_is_a_guess(sizes: dict[str, Any]) -> None:
    """A number without it would be taken for a measurement."""
    lines = memory.as_text(peaks(**sizes), JOB)
    assert [line.split()[0] for line in lines[2:6]] == ["build", "train", "sync", "rollout"]
    assert lines[-1].startswith("guesses: ")
    assert memory.as_json(peaks(**sizes), JOB)["guesses"] == GUESSES
