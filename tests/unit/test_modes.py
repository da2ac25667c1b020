"""Who shares devices with whom: the choice by table, and where the engines sit then."""

from __future__ import annotations

import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sglang.agents import AgentRollout, create_rollout
from megatron_sglang.config_load import split_argv
from megatron_sglang.dry_run import plan_command
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.engine.options import ENVIRONMENT, find_python
from megatron_sglang.engine.router import Router
from megatron_sglang.engine.server import version_in
from megatron_sglang.errors import ConfigError, SetupError
from megatron_sglang.placement import both_fit, choose_mode, device_order, engine_first, engines_in, first_device
from megatron_sglang.rollout import Rollout
from megatron_sglang.training import modes
from megatron_sglang.training.run import engine_options
from megatron_sglang.types import SamplingParams

TABLE = [
    # wanted, devices, trainer ranks, fits, art -> mode, why
    ("auto", 0, 2, None, False, "colocated", "no CUDA device"),
    ("auto", 8, 4, None, False, "split", "8 CUDA devices, of which 4 train: 4 left for the engine"),
    ("auto", 8, 8, None, False, "colocated", "a trainer rank on each"),
    ("auto", 1, 1, True, False, "colocated", "1 CUDA device, a trainer rank on each"),
    ("auto", 1, 1, None, False, "colocated", "a trainer rank on each"),
    ("auto", 1, 1, False, False, "shared", "do not fit into it at the same time"),
    ("auto", 1, 1, True, True, "shared", "by ART's rule"),
    ("auto", 2, 1, True, True, "split", "1 left"),
    ("split", 0, 2, None, False, "split", "rollout.mode=split; no CUDA device"),
    ("shared", 8, 8, True, False, "shared", "rollout.mode=shared"),
    ("colocated", 8, 4, None, False, "colocated", "rollout.mode=colocated"),
]


@pytest.mark.parametrize(("wanted", "devices", "ranks", "fits", "art", "mode", "why"), TABLE)
def test_the_choice_and_its_reason(wanted, devices, ranks, fits, art, mode, why) -> None:
    """A run that shares a device by surprise runs out of memory in its first batch."""
    found = choose_mode(wanted, devices=devices, trainer_ranks=ranks, fits=fits, art=art)
    assert found.mode == mode
    assert why in found.why
    assert "\n" not in found.why


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"wanted": "split", "devices": 4, "trainer_ranks": 4}, "leaves none for the engine; lower"),
        ({"wanted": "auto", "devices": 2, "trainer_ranks": 4}, "4 trainer ranks on a node with 2 CUDA devices"),
        ({"wanted": "auto", "devices": 2, "trainer_ranks": 2, "art": True}, "all of them the trainer's"),
        ({"wanted": "shared", "devices": 1, "trainer_ranks": 1, "external": ["http://h:1"]}, "leave one of them out"),
    ],
)
def test_what_a_node_cannot_give(arguments, text) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_mode(**arguments)


@pytest.mark.parametrize(
    ("mode", "devices", "first"),
    [
        ("colocated", 8, True),
        ("colocated", 0, False),
        ("shared", 1, True),
        ("shared", 0, True),
        ("split", 8, False),
        ("external", 8, False),
    ],
)
def test_the_engine_comes_first_where_it_counts_free_memory(mode, devices, first) -> None:
    """Built at the same time on one GPU, the model is in the way of SGLang's cache, or not, by chance. On a CPU the
    starts overlap, which halves the demo's start-up."""
    assert engine_first(mode, devices=devices) is first


def test_released_weights_are_not_expected_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that send a difference would build on memory that was given away."""
    base = ["model.hf_path=m", "data.train=t"]
    saver = [*base, "sglang.enable_memory_saver=true"]
    assert not modes.releases(split_argv(base, local_world_size=1).config)
    assert modes.releases(split_argv(saver, local_world_size=1).config)
    for method in ("adapter", "merge-on-engine", "disk", "restart"):
        with pytest.raises(ConfigError, match=f"sync.method={method} with sglang.enable_memory_saver"):
            modes.releases(split_argv([*saver, f"sync.method={method}"], local_world_size=1).config)


def test_a_router_where_there_is_something_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and silently not used it would be believed in. The policy is no ServerArgs field: no engine may get
    it."""
    base = ["model.hf_path=m", "data.train=t", "rollout.engine=fake", f"log.run_dir={tmp_path}", "rollout.mode=split"]
    routed = [*base, "--sglang-router-policy", "cache_aware"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said: list[str] = []

    def create(argv: list[str], tp_size: int):
        config = split_argv([*argv, f"engine.tp_size={tp_size}"], local_world_size=2).config
        said.clear()
        options = engine_options(config)
        assert "router_policy" not in options.extra
        return modes.create(config, options, said.append)

    assert create(base, 1).router is None
    assert said[1].startswith("router: none, because our own client keeps a session at one engine")
    create(base, 2)
    assert len(said) == 1, "with one engine there is nothing to say"
    group = create(routed, 1)
    assert isinstance(group.router, Router)
    assert (
        said[1] == "router: sglang-router, cache_aware, in front of 2 engines; each completion is a request of its own"
    )
    config = split_argv(routed, local_world_size=2).config.rollout
    more: Any = {
        "engine": group,
        "reward": None,
        "tokenizer": SimpleNamespace(decode=str),
        "sampling": SamplingParams(),
    }
    assert isinstance(create_rollout(config, seed=0, say=said.append, **more), AgentRollout)
    more["engine"] = create(routed, 2)
    assert said[1] == "router: there is one engine, so nothing to choose"
    assert isinstance(create_rollout(config, seed=0, say=said.append, **more), Rollout)
    monkeypatch.setitem(sys.modules, "sglang_router", None)
    assert create(routed, 1).router is None
    assert "sglang-router is not installed (megatron-sglang[router]), so router_policy=cache_aware has no" in said[1]
    with pytest.raises(ConfigError, match=r"sglang\.router_policy=sticky; expected manual or cache_aware or "):
        split_argv([*base, "--sglang-router-policy=sticky"], local_world_size=2)


def test_expert_parallelism_goes_by_sglangs_name() -> None:
    """It is an option of the engine room too, which must not get it twice."""
    argv = ["model.hf_path=m", "data.train=t", "rollout.engine=fake", "--sglang-ep-size", "2"]
    config = split_argv(argv, local_world_size=2).config
    options = engine_options(config)
    assert (options.tp_size, options.ep_size) == (2, 2)
    assert "ep_size" not in options.extra
    assert "--engine-ep 2" in plan_command(config)


def test_external_engines_need_no_device() -> None:
    found = choose_mode("auto", devices=8, trainer_ranks=8, external=["http://a:1", "http://b:2"])
    assert (found.mode, found.why) == ("external", "engine.external names http://a:1, http://b:2")


def test_both_fit() -> None:
    """A 30B model in bf16 beside itself: not in 80 GB, nor in 141 GB with the engine's default share."""
    gb = 10**9
    assert not both_fit(61 * gb, 80 * gb, 0.3)
    assert not both_fit(61 * gb, 141 * gb, 0.3)
    assert not both_fit(61 * gb, 141 * gb, 0.5)
    assert both_fit(16 * gb, 141 * gb, 0.3)


@pytest.mark.parametrize(
    ("devices", "ranks", "tp_size", "count", "sizes"),
    [(8, 4, 4, None, [4]), (8, 4, 2, None, [2, 2]), (8, 6, 1, None, [1, 1]), (8, 4, 1, 3, [1, 1, 1]),
     (8, 5, 2, None, [2]), (0, 1, 2, None, [2]), (0, 2, 1, 1, [1]), (0, 2, 1, None, [1, 1])],
)  # fmt: skip
def test_engines_of_a_split_have_their_own_sizes(devices, ranks, tp_size, count, sizes) -> None:
    """They need neither equal nor divide the trainer's ranks, and start after the trainer's devices."""
    found = engines_in("split", devices=devices, trainer_ranks=ranks, tp_size=tp_size, count=count)
    assert [len(one) for one in found] == sizes
    assert [rank for one in found for rank in one] == list(range(sum(sizes)))
    assert first_device("split", devices=devices, trainer_ranks=ranks) == (ranks if devices else 0)


def test_engines_that_find_no_place() -> None:
    with pytest.raises(ConfigError, match=r"1 engine\(s\) of 8 ranks on the 4 devices that do not train; .* 4 or less"):
        engines_in("split", devices=8, trainer_ranks=4, tp_size=8)
    with pytest.raises(ConfigError, match="does not divide the 4 trainer ranks"):
        engines_in("shared", devices=4, trainer_ranks=4, tp_size=3)


def test_devices_of_both_are_apart() -> None:
    assert device_order([1, 2, 3], [0]) == "1,2,3,0"
    with pytest.raises(ConfigError, match=r"devices \[0\] are given to training and to inference"):
        device_order([0, 1], [0])


@pytest.mark.parametrize(("mode", "method"), [("shared", "broadcast"), ("shared", "disk"), ("external", "restart")])
def test_methods_that_a_mode_cannot_have(mode, method) -> None:
    """Said before an engine is started for minutes."""
    from megatron_sglang.training.modes import check_method

    with pytest.raises(ConfigError, match=f"sync.method={method}"):
        check_method(mode, method)
    check_method(mode, "generic")
    check_method("split", method)


def test_a_broadcast_needs_a_gpu_of_its_own_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses it in the first update, minutes after the start; gloo between CPUs does not mind."""
    from megatron_sglang.training import modes

    modes.check_method("colocated", "broadcast")
    monkeypatch.setattr(modes, "devices", lambda: 2)
    modes.check_method("split", "broadcast")
    with pytest.raises(ConfigError, match="two processes on one GPU"):
        modes.check_method("colocated", "broadcast")


def test_the_engines_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A given interpreter wins over one that is found, and that over ours."""
    monkeypatch.chdir(tmp_path)
    assert find_python() == sys.executable
    own = tmp_path / ENVIRONMENT
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert find_python() == str(own), "not where the link leads: there it has other packages"
    assert find_python("/opt/engine/bin/python") == "/opt/engine/bin/python"


def test_sglang_is_asked_of_the_interpreter_that_will_run_it(tmp_path: Path) -> None:
    """Ours says nothing about another environment's."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    with pytest.raises(SetupError, match=rf"needs sglang 0\.5\.\d+, {python} has none; install it there"):
        create_engine(EngineOptions("m", python=python)).start()
    with pytest.raises(SetupError, match=r"engine.python=/nonexistent/python is no Python that runs"):
        create_engine(EngineOptions("m", python="/nonexistent/python")).start()
    assert version_in(sys.executable, "no-such-package") == ""
