"""Modes with a real trainer: engines of other sizes than the trainer's, and taking turns on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
HF = str(ROOT / "examples" / "tiny_fim" / "model")


@pytest.fixture
def own_environment(tmp_path: Path) -> str:
    """An interpreter of another environment, which sees the packages of ours by a .pth file."""
    folder = tmp_path / ".venv-sglang-server"
    venv.create(folder, symlinks=True, with_pip=False)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return str(folder / "bin" / "python")


def test_one_trainer_rank_feeds_an_engine_of_two_in_its_own_environment(run_ranks, own_environment: str) -> None:
    """Bit for bit by all paths, in processes of the given interpreter; and a dead engine rank ends a broadcast."""
    [found] = run_ranks(1, "cases_modes.split", timeout_s=300, hf=HF, layout={}, tp_size=2, count=1,
                        python=own_environment, kill=True)  # fmt: skip
    first, second = found["digests"]
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]
    assert found["exchanges"] == 2 * found["buckets"], "one round for each engine rank"
    assert found["version"] == 7
    assert found["links"] == [own_environment]
    text, seconds, loaded = found["killed"]
    assert loaded == [0, 1]
    assert "version 99 was not published: " in text
    assert seconds < 60, "the other rank must not wait for its deadline"


def test_two_trainer_ranks_feed_one_engine_rank(run_ranks) -> None:
    """The second trainer rank has no engine rank, and all of what it holds goes to the first."""
    found = run_ranks(2, "cases_modes.split", timeout_s=300, hf=HF, layout={"expert-model-parallel-size": 2},
                      tp_size=1, count=1)  # fmt: skip
    for result in found:
        first, second = result["digests"]
        assert len(set(first)) == len(set(second)) == 1
        assert result["exchanges"] == result["buckets"]


RUN = [
    *("--config", "conf/tiny_cpu.yaml", "rollout.engine=fake", "rollout.batches=2", "rollout.samples_per_prompt=4"),
    *("data.eval=", "reward.name=function:letter_reward.vowels", "--micro-batch-size", "16", "log.trackers=[]"),
]


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that neither takes turns nor gives memory back."""
    folder = tmp_path_factory.mktemp("plain")
    argv = [*RUN, "rollout.mode=colocated", "sglang.enable_memory_saver=false", f"log.run_dir={folder}"]
    assert run_ranks(2, "run", timeout_s=200, argv=argv) == ["", ""]
    return folder


def test_taking_turns_changes_no_digit(run_ranks, tmp_path: Path, plain: Path) -> None:
    """What is lost or moved on the way out and back would be seen in the next loss, and the engine's tokens follow from
    every bit of its weights."""
    argv = [*RUN, "rollout.mode=shared", f"log.run_dir={tmp_path}"]
    found = run_ranks(2, "cases_modes.turns", timeout_s=200, argv=argv)
    colocated, shared = (
        [{name: value for name, value in one.items() if not name.startswith("timing")} for one in records_of(folder)]
        for folder in (plain, tmp_path)
    )
    names = {name for record in colocated for name in record if "loss" in name or "norm" in name or "reward" in name}
    assert len(names) > 4
    for one, other in zip(colocated, shared, strict=True):
        assert {name: one.get(name) for name in names} == {name: other.get(name) for name in names}
    assert (plain / "rollouts.jsonl").read_text() == (tmp_path / "rollouts.jsonl").read_text()
    for rank in found:
        phases = rank["seen"]
        assert len(phases) == 3, "two rollout batches, and the publication at the end"
        for phase in phases[:2]:
            assert phase["moved"] > 1 << 20
            assert {size for _, size, _ in phase["away"]} == {0}, "nothing of the trainer is left on the device"
            assert phase["after"] == phase["before"], "the same tensors with the same bytes"
        assert len(phases[1]["before"]) > len(phases[0]["before"]), "the optimizer's state came with the first step"


def test_an_engine_that_gives_its_memory_back_changes_no_digit(run_ranks, tmp_path: Path, plain: Path) -> None:
    """free_cache_engine: released while the trainer trains, its weights and caches come anew with the next version."""
    argv = [*RUN, "sglang.enable_memory_saver=true", f"log.run_dir={tmp_path / 'true'}"]
    assert run_ranks(2, "run", timeout_s=200, argv=argv) == ["", ""]
    kept = {}
    for saver, folder in {"false": plain, "true": tmp_path / "true"}.items():
        records = records_of(folder)
        assert ["timing_s/release" in one for one in records] == [saver == "true", saver == "true", False]
        kinds = ("train/loss", "train/grad_norm", "sync/update_norm", "rollout/reward")
        kept[saver] = [{name: value for name, value in one.items() if name.startswith(kinds)} for one in records]
        assert not any(name.startswith("memory/") for one in records for name in one), "a CPU has no ledger"
    assert kept["true"] == kept["false"]
    assert len(kept["true"][0]) > 4
    command = [sys.executable, str(ROOT / "benchmarks/cycle.py"), str(tmp_path / "true"), "--output", "times.json"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    times = json.loads((tmp_path / "times.json").read_text())
    phases = {name: found["median"] for name, found in times["seconds"]["phases"].items()}
    expected = "resume sync rollout/generate rollout/reward release batches logprobs/reference train other"
    assert phases.keys() > set(expected.split())
    assert all(seconds >= 0 for seconds in phases.values()), phases
    assert sum(phases.values()) == pytest.approx(times["seconds"]["whole"]["median"])
    assert phases["resume"] > 0
    assert times["tokens_per_s"]["trained"]["median"] > times["tokens"]["generated"]["median"] / phases["train"]
    assert times["configuration"]["rollout"]["batches"] == 2


def test_an_engine_is_not_told_to_take_memory_that_is_not_there(run_ranks, tmp_path: Path) -> None:
    """It would end, be started again, and end again; who has kept the memory would not be said."""
    argv = [*RUN, "sglang.enable_memory_saver=true", f"log.run_dir={tmp_path}"]
    for error in run_ranks(2, "cases_modes.without_room", timeout_s=200, argv=argv):
        assert "memory at resume: 20.0 GB of the device are free, the engine takes 50.0 GB back" in error, error
