"""The sync methods beside merged buckets, against real SGLang servers: the same weights, and no fault goes through."""

from __future__ import annotations

import asyncio
import concurrent.futures
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_tools import Publisher, Weights, engine_options, until_decoding
from methods_tools import RANK, Drawn, Given, draw, merged
from one_rank import Alone
from safetensors.torch import load_file
from tiny_models import make_model

from megatron_sglang.config import LoraConfig
from megatron_sglang.engine import create_engine
from megatron_sglang.engine.lora_options import lora_server_args
from megatron_sglang.engine.method_calls import MethodCalls
from megatron_sglang.errors import EngineStaleError, WeightSyncError
from megatron_sglang.sync import GenericPath, publish
from megatron_sglang.sync_methods import AdapterPath, DiskPath, MergeOnEnginePath, RestartPath
from megatron_sglang.types import GenerateRequest, SamplingParams
from megatron_sglang.weights.disk import DiskWriter

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = pytest.mark.cpu_e2e

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
REQUESTS = [GenerateRequest((1, 40, 2, 41, seed), GREEDY) for seed in range(3, 9)]
LONG = [GenerateRequest((1, 40, 2, 41), SamplingParams(max_new_tokens=200, seed=seed)) for seed in range(160)]


def disk_path(engine: HttpEngine, weights: Given, home: Path, model: Path, kind: type[DiskPath] = DiskPath) -> DiskPath:
    return kind(Alone(), DiskWriter(Alone(), weights, home, model, "float32"), engine, MethodCalls(engine))


@pytest.fixture
def publish_direct(publish: Publisher) -> Publisher:
    """The session's engine by buckets; the name `publish` is the product's here."""
    return publish


@pytest.fixture(scope="module")
def rescore_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[torch.Tensor]]:
    """transformers' logprobs of completions under given weights of a model."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("rescore")

    def score(model: Path, weights: Weights, requests: Any, completions: Any) -> list[torch.Tensor]:
        shutil.copy(model / "config.json", folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        scores = []
        for request, completion in zip(requests, completions, strict=True):
            with torch.no_grad():
                logits = judge(torch.tensor([request.token_ids_T + completion.token_ids_T])).logits[0]
            logprobs = logits[len(request.token_ids_T) - 1 : -1].log_softmax(-1)
            scores.append(logprobs.gather(1, torch.tensor(completion.token_ids_T)[:, None])[:, 0])
        return scores

    return score


# ---- disk ----


def test_a_folder_leaves_the_bits_of_buckets(engine, publish_direct, tiny_model, weights, other_weights, tmp_path):
    """Each engine rank reads its own; one that reads something else samples nonsense that looks like text."""
    given = Given(weights, limit=300_000)
    path = disk_path(engine, given, tmp_path, tiny_model)
    expected = [publish_direct(weights), publish_direct(other_weights)]
    found = []
    for given.weights in (weights, other_weights):
        report = publish(Alone(), engine, path, publish_direct.next_version)
        found.append(report.engine_digest)
    assert found == expected
    assert report.buckets == len(list(given.buckets(0))) > 4
    assert {"prepare", "begin", "load", "verify"} == report.seconds.keys()
    assert engine.generate(REQUESTS[:1])[0].weight_version == report.version


def test_a_spoiled_folder_is_not_served_and_the_next_one_heals(engine, publish_direct, tiny_model, weights, tmp_path):
    path = disk_path(engine, Given(weights, limit=300_000), tmp_path, tiny_model)
    write = path.writer.write

    def spoiled(version: int) -> Any:
        folder = write(version)
        file = Path(folder.path, "model-00002.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        return folder

    path.writer.write = spoiled  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match=r"folder, engine rank 0: .*model-00002.safetensors ends after"):
        publish(Alone(), engine, path, publish_direct.next_version)
    with pytest.raises(EngineStaleError):
        engine.generate(REQUESTS)
    path.writer.write = write  # type: ignore[method-assign]
    healed = publish(Alone(), engine, path, publish_direct.next_version)
    assert healed.engine_digest == publish_direct(weights)


# ---- merging in the engine ----


@pytest.fixture
def merging(engine: HttpEngine, weights: Weights, tmp_path: Path) -> MergeOnEnginePath:
    """Every weight of the model's layers has an adapter; the embedding is tied to the head."""
    adapters = Drawn(draw(weights, EVERY, 1), tmp_path, "")
    whole = Given(merged(weights, adapters.pairs))
    return MergeOnEnginePath(
        Alone(),
        adapters,
        GenericPath(Alone(), Given(weights), engine),
        GenericPath(Alone(), whole, engine),
        engine,
        MethodCalls(engine),
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        dtype="float32",
        exact=True,
    )


def set_adapters(path: MergeOnEnginePath, weights: Weights, seed: int) -> Weights:
    """Other adapters; the merged weights, which the trainer would send in their place."""
    path.adapters.pairs = draw(weights, EVERY, seed)  # type: ignore[attr-defined]
    whole = merged(weights, path.adapters.pairs)  # type: ignore[attr-defined]
    path.whole.weights.weights = whole  # type: ignore[attr-defined]
    return whole


def test_merging_in_the_engine_leaves_the_bits_of_merged_weights(engine, publish_direct, merging, weights):
    """Version after version, from the untouched base: fused q/k/v and gate/up, stacked experts, two ranks."""
    digests, sent = [], 0
    for seed in (1, 2, 3):
        whole = set_adapters(merging, weights, seed)
        report = publish(Alone(), engine, merging, publish_direct.next_version)
        digests.append((report.engine_digest, whole))
        sent = report.bytes
    assert [digest for digest, _ in digests] == [publish_direct(whole) for _, whole in digests]
    full = sum(tensor.nbytes for tensor in weights.values())
    assert full / sent > 3, "of rank 4 and 128 columns; large models are hundreds"
    deltas = [whole[name] - weights[name] for name in weights]
    norm = float(torch.cat([delta.flatten() for delta in deltas]).double().norm())
    assert report.fidelity.update_norm == pytest.approx(norm, rel=1e-5)
    assert len(report.fidelity.layers) == 4


@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_nothing_is_served_before_the_first_merge_is_compared(
    engine, publish_direct, merging, weights, monkeypatch, scale
):
    """The base alone is another policy, and a merge that nobody has compared may be. The second version is proved by
    the first, and does not wait for requests of others."""
    serve, compare, happened = engine.publish, merging.calls.compare, []
    monkeypatch.setattr(engine, "publish", lambda version: (happened.append("served"), serve(version)))
    monkeypatch.setattr(merging.calls, "compare", lambda limit: (happened.append("compared"), compare(limit))[1])
    set_adapters(merging, weights, 1)
    merging.adapters.scale *= scale
    if scale != 1:
        with pytest.raises(WeightSyncError, match="elements are not what the trainer merges"):
            publish(Alone(), engine, merging, publish_direct.next_version)
        assert happened == ["compared"]
        publish_direct(weights)
        assert happened == ["compared", "served"]
        return
    publish(Alone(), engine, merging, publish_direct.next_version)
    assert happened == ["compared", "served"]
    assert engine.generate(REQUESTS[:1])[0].weight_version == engine.version
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        others = pool.submit(engine.generate, LONG)
        asyncio.run(until_decoding(engine, 20))
        publish(Alone(), engine, merging, publish_direct.next_version)
        assert "abort" in {one.finish_reason for one in others.result()}
    assert happened == ["compared", "served", "served"]
    publish_direct(weights)


def test_an_adapter_that_does_not_arrive_is_noticed_and_healed(engine, publish_direct, merging, weights):
    set_adapters(merging, weights, 1)
    publish(Alone(), engine, merging, publish_direct.next_version)
    lost = next(iter(merging.adapters.pairs))
    del merging.adapters.pairs[lost]
    with pytest.raises(WeightSyncError, match=r"adapters of 1 weights did not arrive"):
        publish(Alone(), engine, merging, publish_direct.next_version)
    with pytest.raises(EngineStaleError):
        engine.generate(REQUESTS)
    whole = set_adapters(merging, weights, 2)
    healed = publish(Alone(), engine, merging, publish_direct.next_version)
    assert healed.engine_digest == publish_direct(whole)


def test_a_base_that_another_update_replaced_is_noticed_and_healed(
    engine, publish_direct, merging, weights, other_weights
):
    """Norms and embeddings are sent once; if they are not the base's any more, the sum is another model."""
    set_adapters(merging, weights, 1)
    publish(Alone(), engine, merging, publish_direct.next_version)
    publish_direct(other_weights)
    with pytest.raises(WeightSyncError, match=r"parameters without adapters are not the base's any more"):
        publish(Alone(), engine, merging, publish_direct.next_version)
    whole = set_adapters(merging, weights, 2)
    healed = publish(Alone(), engine, merging, publish_direct.next_version)
    assert healed.engine_digest == publish_direct(whole)


def test_an_engine_that_merges_otherwise_is_refused(engine, publish_direct, merging, weights):
    """The first version is sent whole as well: a scale or an order that differs cannot pass."""
    set_adapters(merging, weights, 1)
    merging.adapters.scale *= 1.001
    with pytest.raises(WeightSyncError, match=r"elements are not what the trainer merges, by up to .* at most 0 is"):
        publish(Alone(), engine, merging, publish_direct.next_version)
    with pytest.raises(EngineStaleError):
        engine.generate(REQUESTS)
    publish_direct(weights)


# ---- adapters that SGLang serves ----


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def served(dense: Path) -> Iterator[tuple[HttpEngine, AdapterPath, Weights]]:
    """An engine (TP 2) on a dense model's folder, with LoRA and prefix cache, and its path."""
    extra = lora_server_args(LoraConfig(rank=RANK), str(dense), "cpu", {}) | {"disable_radix_cache": False}
    options = engine_options(dense, load_format="auto", max_total_tokens=2048, max_running_requests=8, extra=extra)
    weights = load_file(dense / "model.safetensors")
    with create_engine(options) as engine:
        adapters = Drawn(draw(weights, EVERY, 1), dense.parent / "adapters", str(dense))
        path = AdapterPath(Alone(), adapters, engine, MethodCalls(engine), home=str(dense))
        with pytest.raises(EngineStaleError, match="the base alone is not the policy"):
            engine.generate(REQUESTS)
        yield engine, path, weights


def publish_next(served: tuple[HttpEngine, AdapterPath, Weights], seed: int, rank: int = RANK) -> Any:
    engine, path, weights = served
    path.adapters.pairs, path.adapters.rank = draw(weights, EVERY, seed, rank), rank  # type: ignore[attr-defined]
    return publish(Alone(), engine, path, (engine.version or 0) + 1)


def loaded(engine: HttpEngine) -> list[str]:
    cards = engine.connected.get("/v1/models", 10.0).json()["data"]
    return [card["id"] for card in cards if card.get("parent")]


def test_adapters_answer_as_merged_weights_do(served, rescore_of: Callable[..., Any], dense):
    """Another version's adapter, or none at all, answers as readily."""
    engine, path, weights = served
    digests = set()
    for seed in (1, 2, 3):
        report = publish_next(served, seed)
        digests.add(report.engine_digest)
        assert engine.adapter == f"policy-v{report.version}"
        completions = engine.generate(REQUESTS)
        assert {one.weight_version for one in completions} == {report.version}
        whole = merged(weights, path.adapters.pairs)
        for completion, expected in zip(completions, rescore_of(dense, whole, REQUESTS, completions), strict=True):
            assert (torch.tensor(completion.logprobs_T) - expected).abs().max() < 1e-3
    assert len(digests) == 3
    assert loaded(engine) == ["policy-v2", "policy-v3"], "the serving one and the one before"
    assert report.bytes < sum(tensor.nbytes for tensor in weights.values()) / 3


def test_a_loaded_adapter_begins_without_cached_prefixes(served):
    """SGLang's cache belongs to one load of an adapter: a prefix of the version before would be another policy's."""
    engine, _, _ = served

    def cached() -> int:
        body = {
            "input_ids": [list(range(5, 69))],
            "sampling_params": [{"max_new_tokens": 1}],
            "lora_path": [engine.adapter],
        }
        return engine.connected.post("/generate", body, 60.0, admin=False)[0]["meta_info"]["cached_tokens"]

    publish_next(served, 4)
    assert [cached(), cached()] == [0, 63]
    publish_next(served, 5)
    assert [cached(), cached()] == [0, 63]


def test_an_adapter_of_another_rank_is_refused_and_healed(served):
    with pytest.raises(WeightSyncError, match=r"with rank 8 is incompatible"):
        publish_next(served, 6, rank=2 * RANK)
    with pytest.raises(EngineStaleError):
        served[0].generate(REQUESTS)
    publish_next(served, 6)
    served[0].generate(REQUESTS)


def test_a_name_that_is_taken_is_refused_and_healed(served, tmp_path):
    """SGLang keeps what it has under that name: yesterday's adapter under today's version."""
    engine, path, _ = served
    version = engine.version + 1
    taken = path.adapters.write(0)
    begin = path.begin

    def begin_and_take(version: int) -> None:
        begin(version)
        engine.load_adapter(f"policy-v{version}", taken.path)

    path.begin = begin_and_take
    with pytest.raises(WeightSyncError, match=rf"adapter policy-v{version}: .*already loaded"):
        publish_next(served, 7)
    path.begin = begin
    assert publish_next(served, 7).version == version


@pytest.mark.parametrize("how", ["bytes", "dropped"])
def test_an_adapter_that_is_not_whole_in_the_engine_is_refused(served, how):
    """SGLang drops what it cannot place with a warning in its log."""
    engine, path, _ = served
    write = path.adapters.write

    def spoiled(version: int) -> Any:
        folder = write(version)
        file = Path(folder.path, "adapter_model.safetensors")
        content = file.read_bytes()
        if how == "bytes":
            content = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
        else:  # a leaf that SGLang does not know
            content = content.replace(b"layers.1.self_attn.o_proj", b"layers.1.self_attn.x_proj")
            proof = {
                name.replace("layers.1.self_attn.o_proj", "layers.1.self_attn.x_proj"): value
                for name, value in folder.proof.items()
            }
            folder.proof.clear()
            folder.proof.update(proof)
        file.write_bytes(content)
        return folder

    path.adapters.write = spoiled
    text = "has another digest than was written" if how == "bytes" else r"x_proj.*, which SGLang has not wrapped"
    with pytest.raises(WeightSyncError, match=rf"commit, engine rank 0: .*{text}"):
        publish_next(served, 8)
    path.adapters.write = write
    publish_next(served, 8)
    assert engine.generate(REQUESTS)


def test_a_base_that_changed_under_the_adapter_is_refused_and_loaded_anew(served, dense):
    """Merged weights under an adapter count its update twice, and everything looks as it should."""
    engine, path, weights = served
    good = publish_next(served, 9)
    answers = engine.generate(REQUESTS)
    changed = {name: 1.01 * tensor for name, tensor in weights.items() if "norm" in name}
    other = DiskWriter(Alone(), Given(changed), dense.parent / "changed", dense, "float32").write(1)
    engine.connected.post("/update_weights_from_disk", {"model_path": other.path, "load_format": "auto"}, 60.0)
    with pytest.raises(WeightSyncError, match=r"something wrote to it since the last version"):
        publish_next(served, 9)
    with pytest.raises(EngineStaleError):
        engine.generate(REQUESTS)
    path.adapters.pairs = draw(weights, EVERY, 9)
    healed = publish(Alone(), engine, path, good.version)
    assert healed.engine_digest == good.engine_digest
    assert engine.generate(REQUESTS) == answers


# ---- folders as SGLang itself reads them ----


def test_an_engine_that_is_started_on_a_folder_holds_the_bits_of_buckets(
    publish_direct, tiny_model, weights, other_weights, tmp_path
):
    """The engine of `restart` is new in every version, and nothing of the one before may be left."""
    expected = publish_direct(other_weights)
    engine = create_engine(engine_options(tiny_model, log_path=str(tmp_path / "engine.log")))
    try:
        path = disk_path(engine, Given(other_weights, limit=300_000), tmp_path / "home", tiny_model, RestartPath)
        report = publish(Alone(), engine, path, 1)
        assert report.engine_digest == expected
        assert engine.generate(REQUESTS[:1])[0].weight_version == 1
        process = engine.server.pid
        path.writer.weights.weights = {name: tensor for name, tensor in weights.items() if "layers.3" not in name}
        with pytest.raises(WeightSyncError, match=r"version 2 was not published: .* unfilled or hold NaN"):
            publish(Alone(), engine, path, 2)
        assert engine.server.pid != process
        with pytest.raises(EngineStaleError):
            engine.generate(REQUESTS)
        engine.restart()
        with pytest.raises(EngineStaleError, match="it was started again"):  # whatever the folder's weights are
            engine.generate(REQUESTS)
    finally:
        engine.close()
