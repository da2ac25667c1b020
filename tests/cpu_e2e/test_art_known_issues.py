"""Five known issues of SGLang that ART's documentation works around, each as something that works here.

https://github.com/sgl-project/sglang/issues/ 3726 (tensor update with TP > 1), 8076 (out of memory on an update), 4283
(dp_size), 14178 (garbled output with small buckets), and the check of memory balance at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from engine_tools import Publisher, Weights, engine_options, fake_options

from megatron_sglang import digests
from megatron_sglang.buckets import pack, transfer_order
from megatron_sglang.engine import EngineOptions, create_engine, create_engines
from megatron_sglang.errors import ConfigError
from megatron_sglang.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = pytest.mark.cpu_e2e

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8)
REQUESTS = [GenerateRequest((1, 40, 2, 41, seed), GREEDY) for seed in range(3, 11)]
BUCKET = 4 << 20
DIGEST_BYTES = 5 * 8 * digests.CHUNK_WORDS
"""Four temporaries of a digest at a time, and one that is made of them."""
OLD, NEW = "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"


@pytest.fixture(scope="module")
def large_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A dense model of 280 MB, so that a second copy of it cannot hide among what an update needs anyway."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 256}
    config = AutoConfig.for_model("qwen3", **sizes, **heads, tie_word_embeddings=False, eos_token_id=0)
    config.architectures = ["Qwen3ForCausalLM"]
    folder = tmp_path_factory.mktemp("large")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    return folder, {name: torch.randn(shape, generator=generator) / 30 for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=[(OLD, "True"), (NEW, "true")], ids=["old", "new"])
def checked(
    request: pytest.FixtureRequest, large_weights: tuple[Path, Weights], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpEngine]:
    """A TP 2 engine that was started with one of the two variables set."""
    log_path = str(tmp_path_factory.mktemp("large_engine") / "engine.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*request.param)
        with create_engine(engine_options(large_weights[0], max_total_tokens=1024, log_path=log_path)) as engine:
            yield engine


def ranks_of(engine: HttpEngine) -> list[psutil.Process]:
    assert engine.server.pid is not None
    found = psutil.Process(engine.server.pid).children(recursive=True)
    return [process for process in found if "scheduler" in "".join(process.cmdline())]


def test_memory_imbalance_variables_start_an_engine(checked: HttpEngine, request: pytest.FixtureRequest) -> None:
    """SGLang 0.5.17 copies the old variable's value to the new one, which means the opposite: following the advice
    would switch the check on. What it asks for is what the engine gets; the new one passes as it is."""
    environment = psutil.Process(checked.server.pid).environ()  # what it hands down; ranks overwrite theirs by titles
    asked = request.node.callspec.params["checked"][0]
    assert OLD not in environment
    assert environment[NEW] == ("false" if asked == OLD else "true")


def test_an_update_needs_no_second_copy_of_the_model(checked: HttpEngine, large_weights: tuple[Path, Weights]) -> None:
    """#8076: at its highest an engine rank holds its part of the model and a few buckets more."""
    publish, (_, weights) = Publisher(checked), large_weights
    publish(weights, BUCKET)  # what a first update imports and allocates for good
    share = sum(tensor.nbytes for tensor in weights.values()) / 2
    before = {}
    for process in ranks_of(checked):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest size so far is the present one
        before[process.pid] = process.memory_info().rss
    publish(weights, BUCKET)
    for pid, held in before.items():
        status = Path(f"/proc/{pid}/status").read_text()
        peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
        assert peak - held < 4 * BUCKET + DIGEST_BYTES < share / 2, f"grew by {(peak - held) >> 20} MB"


def test_tensor_update_with_tensor_parallelism(publish, rescore, weights, other_weights) -> None:
    """#3726: every rank of a TP 2 engine takes its part, and what it then samples is what transformers computes."""
    engine = publish.engine
    assert engine.options.tp_size == 2
    digests = set()
    for given in (weights, other_weights):
        digests.add(publish(given))
        completions = engine.generate(REQUESTS)
        for completion, expected in zip(completions, rescore(given, REQUESTS, completions), strict=True):
            assert (torch.tensor(completion.logprobs_T) - expected).abs().max() < 1e-4
    assert len(digests) == 2


def test_dp_size_is_refused_and_several_engines_do_it() -> None:
    """#4283: SGLang takes weights with dp_size 1 only. Replicas are engines of their own, updated as one."""
    with pytest.raises(ConfigError, match=r"'dp_size', which this package owns; use tp_size: .* several engines"):
        EngineOptions("unused", extra={"dp_size": 2})
    group = create_engines(fake_options(tp_size=1), 2)
    with group:
        group.begin_update(1)
        group.load(pack(1, 0, [("a", torch.ones(3))]))
        group.commit_update(1, 1)
        assert [completion.weight_version for completion in group.generate(REQUESTS)] == [1] * len(REQUESTS)
        assert len({engine.server.pid for engine in group.engines}) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", ["16 KB", "10 tensors"])
def test_small_buckets_change_nothing(publish, weights, cut: str) -> None:
    """#14178: the same bits in the engine, and the same tokens from it, as with one large bucket."""
    engine = publish.engine
    digest = publish(weights)
    answers = engine.generate(REQUESTS)
    if cut == "16 KB":
        assert publish(weights, 16 << 10) == digest
    else:
        version, names = publish.next_version, sorted(weights, key=transfer_order)
        parts = [names[start : start + 10] for start in range(0, len(names), 10)]
        engine.begin_update(version)
        for index, part in enumerate(parts):
            engine.load(pack(version, index, [(name, weights[name]) for name in part]))
        assert engine.commit_update(version, len(parts)) == digest
    again = engine.generate(REQUESTS)
    assert [(one.token_ids_T, one.logprobs_T) for one in again] == [
        (one.token_ids_T, one.logprobs_T) for one in answers
    ]
