"""The layout that real engine ranks report, and that it does what their loader does."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_tools import Publisher, Weights, engine_options, until_decoding
from safetensors.torch import load_file
from tiny_models import add_prediction_layer, make_model

from megatron_sglang import cli
from megatron_sglang.engine import create_engine
from megatron_sglang.engine.trace_offline import trace_ranks
from megatron_sglang.errors import EngineError, EngineStaleError, WeightSyncError
from megatron_sglang.hf_files import prediction_shapes, tensor_shapes
from megatron_sglang.layout import RankLayout, fold, problems, samples_of
from megatron_sglang.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]

ASKED = [GenerateRequest((7, 8, 9), SamplingParams(max_new_tokens=8, seed=1))]


def ask(engine: HttpEngine, weights: Weights) -> list[RankLayout]:
    return engine.layout({name: tuple(tensor.shape) for name, tensor in weights.items()})


def elements_written(layout: RankLayout, param: str) -> int:
    return sum(write.elements for write in layout.writes if write.param == param)


def test_layout_leaves_a_serving_engine_alone(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """A trace that wrote anything would be served until the next update."""
    digest = publish(weights)
    before = engine.generate(ASKED)
    layouts = ask(engine, weights)
    assert engine.generate(ASKED) == before
    assert problems(layouts, weights) == []
    assert [layout.rank for layout in layouts] == [0, 1]
    for layout in layouts:
        assert len(fold(layout.writes)) == 15
        assert all(elements_written(layout, name) == math.prod(p.shape) for name, p in layout.params.items())
        heads = {write.source for write in layout.writes if write.param == "lm_head.weight"}
        assert heads == {"model.embed_tokens.weight"}
    assert publish(weights) == digest


def test_a_layout_does_not_wait_for_requests(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """SGLang takes the message when the last request has ended, and lets no other begin: an endpoint's long completion
    would hold up the trainer, or make it give the direct path up."""
    publish(weights)
    long = [GenerateRequest((7, 8, 9), SamplingParams(max_new_tokens=200, seed=seed)) for seed in range(160)]
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(engine.generate, long)
        asyncio.run(until_decoding(engine, 20))
        ask(engine, weights)
        assert "abort" in {one.finish_reason for one in others.result()}
    assert engine.generate(ASKED)[0].weight_version == engine.version


def test_an_engine_that_is_not_there_has_the_same_layout(
    engine: HttpEngine, weights: Weights, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`megatron-sglang plan` asks SGLang's code without an engine; what a real one says is the truth."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    live = ask(engine, weights)
    offline = trace_ranks(engine_options(tiny_model), shapes)
    assert [(layout.rank, layout.params, set(layout.writes)) for layout in offline] == [
        (layout.rank, layout.params, set(layout.writes)) for layout in live
    ]
    arguments = ["--nproc", "2", "--expert-model-parallel-size", "2", "--dtype", "float32", "--json"]
    assert cli.main(["plan", str(tiny_model), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    taken = {layout.rank: 4 * sum(write.elements for write in layout.writes if write.source) for layout in live}
    for rank, size in taken.items():
        assert sum(pair["bytes"] for pair in plan["pairs"] if pair["engine_rank"] == rank) == size
    assert plan["bytes"] == sum(taken.values())


@pytest.mark.parametrize(
    ("model", "tp_size", "ep_size"),
    [("qwen3", 4, 1), ("llama", 4, 1), ("qwen3_moe", 4, 2), ("mixtral", 4, 2), ("deepseek_v3", 2, 2)],
)
def test_every_element_of_other_models_comes_from_one_tensor(
    model: str, tp_size: int, ep_size: int, tmp_path: Path
) -> None:
    """On more ranks than two cores can serve; without values, which benchmarks/layout_matrix.py compares."""
    folder = make_model(model, tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    found = trace_ranks(engine_options(folder, tp_size=tp_size, ep_size=ep_size), shapes)
    assert len(found) == tp_size
    assert problems(found, shapes) == []
    assert not any(layout.generic for layout in found)


@pytest.mark.parametrize("model", ["glm4_moe", "deepseek_v3"])
def test_layers_for_multi_token_prediction_do_not_take_the_direct_path_away(model: str, tmp_path: Path) -> None:
    """The hub's GLM-4.5 and DeepSeek-V3 have one. The loader passes it over, so an update must not wait for it."""
    folder = add_prediction_layer(make_model(model, tmp_path))
    found = trace_ranks(engine_options(folder), shapes := tensor_shapes(folder))
    assert problems(found, shapes) == []
    [layer, *_] = prediction_shapes(folder)
    assert f"{layer} is used by no rank" in "".join(problems(found, [*shapes, layer]))


def test_an_engine_that_cannot_be_is_an_error(weights: Weights, tiny_model: Path) -> None:
    """With SGLang's own reason, not a traceback of a child process."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with pytest.raises(EngineError, match=r"engine TP 3, EP 1: .* 512 is not divisible by 3"):
        trace_ranks(engine_options(tiny_model, tp_size=3), shapes)


def test_self_test_on_a_real_engine(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Replay equals load_weights in every bit, two exchanged tensors are seen, and nothing is served before a sync."""
    publish(weights)
    reports = engine.self_test(weights)
    assert [(report["writes"], report["generic"], report["control"]) for report in reports] == [(135, 0, True)] * 2
    with pytest.raises(EngineStaleError, match="self-test has overwritten"):
        engine.generate(ASKED)
    publish(weights)
    assert len(engine.generate(ASKED)) == 1


def test_missing_and_foreign_names_are_problems(engine: HttpEngine, weights: Weights) -> None:
    """SGLang's loader skips a name it does not know, and leaves what it is not given, without a word."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes["model.layers.0.no_such.weight"] = (4, 4)
    del shapes["model.layers.1.self_attn.k_proj.weight"]
    found = problems(engine.layout(shapes), shapes)
    assert found == [
        "engine rank 0, 1: model.layers.1.self_attn.qkv_proj.weight[64:96, 0:128] comes from no tensor",
        "engine rank 0, 1: model.layers.0.no_such.weight is used by no rank: the loader does not know it",
    ]


def test_untraceable_shapes_are_an_error_not_a_death(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Whatever SGLang's loader raises during a trace must come back as text, with the engine alive."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes["model.norm.weight"] = (3,)
    with pytest.raises(WeightSyncError, match="layout, engine rank 0"):
        engine.layout(shapes)
    publish(weights)
    assert len(engine.generate(ASKED)) == 1


def test_released_weights_are_not_touched(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Reading memory that was given back would end the engine's process on a GPU. A layout is asked of an engine that
    has made room for the trainer's start, where no version comes by the generic path before."""
    expected = ask(engine, weights)
    engine.release()
    assert ask(engine, weights) == expected
    assert engine.released == {"kv_cache", "cuda_graph"}
    publish(weights)
    engine.release()
    for names in samples_of(weights):
        assert len(engine.self_test({name: weights[name] for name in names})) == 2
    publish(weights)
    assert len(engine.generate(ASKED)) == 1


@pytest.mark.parametrize(("model", "ranks"), [("glm4_moe", (2, 2)), ("qwen3_tied", (2, 1))])
def test_other_architectures(model: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    """Shared experts and expert parallelism; padded vocabulary, head tied by memory. All others:
    benchmarks/layout_matrix.py."""
    folder = make_model(model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    tp_size, ep_size = ranks
    with create_engine(
        engine_options(folder, tp_size=tp_size, ep_size=ep_size, max_total_tokens=1024, max_running_requests=4)
    ) as engine:
        layouts = ask(engine, weights)
        assert problems(layouts, weights) == []
        assert all(report["control"] for report in engine.self_test(weights))
    if model == "glm4_moe":  # the other one has its heads padded for CPUs in a live engine
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        offline = trace_ranks(engine_options(folder, tp_size=tp_size, ep_size=ep_size), shapes)
        assert [set(layout.writes) for layout in offline] == [set(layout.writes) for layout in layouts]
    used = [{write.source for write in layout.writes} for layout in layouts]
    if model == "glm4_moe":
        experts = {name for name in weights if ".experts." in name}
        assert used[0] & used[1] & experts == set()
        assert (used[0] | used[1]) >= experts
    else:
        padding = [w for w in layouts[1].writes if w.param == "model.embed_tokens.weight" and w.const is not None]
        assert [(write.const, write.size) for write in padding] == [(0.0, (12, 128))]
        assert layouts[0].aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_router_that_is_kept_in_fp32_follows_its_weight(tmp_path: Path) -> None:
    """SGLang casts GLM4-MoE's routers at the first forward and keeps that: every parameter is the new version's, and
    tokens go to the old one's experts. The judge is an engine that has never held another version."""
    folder = make_model("glm4_moe", tmp_path)
    first = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    routers = {name: -tensor for name, tensor in first.items() if name.endswith("mlp.gate.weight")}
    assert routers
    options = engine_options(folder, tp_size=1, dtype="bfloat16", max_total_tokens=1024, max_running_requests=4)

    def logprobs(*versions: Weights) -> list[tuple[float, ...]]:
        """Of one engine that gets `versions` one after the other."""
        with create_engine(options) as engine:
            publish = Publisher(engine)
            return [(publish(weights), engine.generate(ASKED)[0].logprobs_T)[1] for weights in versions]

    before, after = logprobs(first, first | routers)
    assert [after] == logprobs(first | routers)
    assert after != before, "routers that say the opposite must matter"
