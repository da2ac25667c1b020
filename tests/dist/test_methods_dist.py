"""Sync methods from real Megatron ranks into a real engine: the same bits by each, whatever the layouts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cpu_e2e"))  # for its tiny models

from tiny_models import make_model

pytestmark = pytest.mark.dist

EXAMPLE = "examples/tiny_fim/model"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # A tied head; experts whole on each side, but not the same ones.
    "experts": (EXAMPLE, {"expert-model-parallel-size": 2}, {"tp_size": 2, "ep_size": 2}),
    "dense": ("qwen3", {"tensor-model-parallel-size": 2, "sequence-parallel": True}, {"tp_size": 1}),
    # One key head, which both engine ranks hold; a vocabulary that the engine pads.
    "tied": ("qwen3_tied", {"pipeline-model-parallel-size": 2}, {"tp_size": 2}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_methods_leave_the_same_bits(run_ranks, tmp_path: Path, name: str) -> None:
    """A fused weight cut in another place, an expert by its local number, a delta from another base: each would train
    on samples of another policy."""
    hf, layout, engine = CASES[name]
    if hf != EXAMPLE:
        hf = str(make_model(hf, tmp_path))
    arguments = {"hf": hf, "layout": layout, "engine": engine, "folder": str(tmp_path / "weights")}
    found, other = run_ranks(2, "cases_methods.agree", timeout_s=200, **arguments)
    assert found == other, "every rank has the same report"
    digests = {method: [report[0] for report in found[method]] for method in ("generic", "disk", "merge-on-engine")}
    assert digests["disk"] == digests["generic"] == digests["merge-on-engine"]
    assert len(set(digests["generic"])) == 2
    for ours, expected in zip(found["merge-on-engine"], found["generic"], strict=True):
        assert ours[1:3] == pytest.approx(expected[1:3], rel=1e-5)
        assert ours[3] == pytest.approx(expected[3], rel=1e-5)
    assert found["adapter"][1] == pytest.approx(found["generic"][1][1], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["policy-v1", "v000001", "v000002"]


def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(run_ranks, tmp_path: Path) -> None:
    """The others would wait for it, or finish a folder that lacks its files."""
    arguments = {"hf": EXAMPLE, "layout": {"expert-model-parallel-size": 2}, "folder": str(tmp_path)}
    for error in run_ranks(2, "cases_methods.full_disk", **arguments):
        assert "model-00001.safetensors cannot be written: " in error
    assert list(tmp_path.iterdir()) == []


def test_the_direct_path_alone_begins_with_a_self_test(run_ranks) -> None:
    """It has no generic path beside it that would show a layout which was misunderstood."""
    found = run_ranks(1, "cases_methods.direct_alone", hf=EXAMPLE)[0]
    assert found["error"] == "layout, engine rank 0: nothing to trace"
    # The embedding, which is the head too, the last norm; two layers: attention, norms and router 9, two experts 6.
    assert found["tested"] == [1, 1, 15, 15]
