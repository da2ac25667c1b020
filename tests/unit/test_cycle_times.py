"""benchmarks/cycle.py on records that a real `RunLog` wrote: phases that add up, what is left out, what grew."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_sglang import trace
from megatron_sglang.errors import DataError
from megatron_sglang.trace import METRICS, RunLog, read_lines

SCRIPT = Path(__file__).parents[2] / "benchmarks/cycle.py"


@pytest.fixture(scope="module")
def cycle_times() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cycle_times", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four batches, the first one slow, and the evaluation at the end; the device loses 0.5 GB a batch."""
    clock = [100.0]
    monkeypatch.setattr(trace.time, "perf_counter", lambda: clock[0])

    def work(seconds: float) -> None:
        clock[0] += seconds

    with RunLog(tmp_path, config={"seed": 1}, echo=lambda _: None) as log:
        for batch in range(4):
            with log.span("sync"):
                work(0.1 if batch == 0 else 0.02)
            with log.span("rollout"):
                with log.span("generate"):
                    work(0.02)
                with log.span("reward"):
                    work(0.005)
            with log.span("release"):
                work(0.01)
            for _ in range(2):
                with log.span("train"):
                    work(0.01)
            numbers = {"rollout/tokens": 100.0, "train/tokens": 300.0, "sync/resume_s": 0.005}
            numbers |= {"memory/release_free_gb": 90.0 - 0.5 * batch, "memory/train_reserved_gb": 40.0 + batch}
            log.step(batch, numbers)
        with log.span("eval"):
            pass
        log.step(4, {"eval/pass_rate": 0.5})
    return tmp_path


def test_phases_add_up_and_the_warm_up_is_left_out(cycle_times: ModuleType, run_dir: Path) -> None:
    """A phase counted twice, or a slow first batch, would make every share wrong."""
    records = read_lines(run_dir / METRICS)
    found = cycle_times.analyse(records)
    assert (found["batches"], found["enough_for_a_median"]) == (3, False)
    for one, record in zip(found["each"], records[1:4], strict=True):
        assert sum(one.values()) == pytest.approx(record["timing_s/iteration"])
        assert one["sync"] + one["resume"] == pytest.approx(record["timing_s/sync"])
        assert one["resume"] == 0.005
        assert one["rollout/rest"] == pytest.approx(
            record["timing_s/rollout"] - one["rollout/generate"] - one["rollout/reward"]
        )
        assert one["other"] == pytest.approx(0.0)
    assert found["seconds"]["phases"]["sync"]["max"] == pytest.approx(0.015), "the first batch took longer"
    switch = [record["timing_s/sync"] + record["timing_s/release"] for record in records[1:4]]
    assert found["seconds"]["switch"]["median"] == pytest.approx(sorted(switch)[1])
    rates = sorted(300.0 / record["timing_s/train"] for record in records[1:4])
    assert found["tokens_per_s"]["trained"]["median"] == pytest.approx(rates[1])


def test_growth_is_positive_where_memory_is_lost(cycle_times: ModuleType, run_dir: Path) -> None:
    """From the second batch to the last: what the first one allocates for good is no leak."""
    found = cycle_times.analyse(read_lines(run_dir / METRICS))
    assert found["growth_gb"] == {"release_free": 1.0, "train_reserved": 2.0}
    assert found["memory_gb"]["release_free"] == {"min": 88.5, "median": 89.0, "max": 89.5}


def test_a_run_that_was_cut_off(cycle_times: ModuleType, run_dir: Path) -> None:
    """In the middle of a line; and before anything but the warm-up was done."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert cycle_times.analyse(read_lines(path))["batches"] == 2
    path.write_text(lines[0])
    with pytest.raises(DataError, match="1 rollout batches, 1 of them warm-up"):
        cycle_times.analyse(read_lines(path))
