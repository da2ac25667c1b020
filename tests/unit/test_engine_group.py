"""How work and devices are divided among several engines; what they do is tests/cpu_e2e/test_engines_fake.py's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sglang import config_load, dry_run
from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.group import EngineGroup, blocks, spread
from megatron_sglang.errors import ConfigError
from megatron_sglang.placement import engines
from megatron_sglang.types import GenerateRequest, SamplingParams


def requests_of(members: list[int]) -> list[GenerateRequest]:
    """Groups of so many samples, each of another prompt."""
    return [
        GenerateRequest((group, 7), SamplingParams(seed=seed)) for group, n in enumerate(members) for seed in range(n)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("members", [[], [1], [8] * 16, [8] * 5, [1] * 7, [2, 9, 1, 1, 4]])
def test_blocks_are_in_order_and_cut_no_group(members: list[int], count: int) -> None:
    """A group that two engines share is prefilled twice; answers out of order go to other prompts."""
    requests = requests_of(members)
    parts = blocks(requests, count)
    assert len(parts) == count
    assert [request for part in parts for request in part] == requests
    prompts = [{request.token_ids_T for request in part} for part in parts]
    assert len(set().union(*prompts)) == sum(map(len, prompts))
    assert max(map(len, parts)) <= len(requests) / count + max(members, default=0)


def test_equal_groups_are_divided_equally() -> None:
    assert [len(part) for part in blocks(requests_of([8] * 16), 4)] == [32] * 4
    assert [len(part) for part in blocks(requests_of([1] * 576), 2)] == [288, 288]


def test_engines_sit_on_the_gpus_of_their_ranks() -> None:
    """On another GPU the trainer's memory could not be opened, and two engines on one would run out of it."""
    options = EngineOptions("m", tp_size=2, device="cuda", log_path="run/engine.log", extra={"page_size": 1})
    first, *others = spread(options, 4)
    assert first == options
    assert [one.extra for one in others] == [{"page_size": 1, "base_gpu_id": gpu} for gpu in (2, 4, 6)]
    assert [one.log_path for one in others] == ["run/engine1.log", "run/engine2.log", "run/engine3.log"]
    assert [one.extra for one in spread(EngineOptions("m", device="cpu"), 2)] == [{}, {}]


def test_engines_of_one_trainer_are_alike() -> None:
    """Their ranks are counted through by one size, and their digests are compared."""
    with pytest.raises(ConfigError, match=r"a group of 2 engines has .*\[\(1, 1\), \(2, 1\)\], expected one pair"):
        EngineGroup([EngineOptions("m"), EngineOptions("m", tp_size=2)])


def test_ranks_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run must show what a run does."""
    assert engines(4, 2) == [range(2), range(2, 4)]
    with pytest.raises(ConfigError, match=r"does not divide the 4 trainer ranks .* to 1 or 2 or 4"):
        engines(4, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = config_load.load_config(Path(__file__).parents[2] / "conf/tiny_cpu.yaml", ["megatron.micro-batch-size=32"])
    shown = dry_run.describe(config)
    assert "# engines\nengine 0: beside trainer ranks 0, 1\nengine 1: beside trainer ranks 2, 3\n" in shown
