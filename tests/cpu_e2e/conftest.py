"""One real SGLang server (TP=2, fp32) for the whole session, a tiny Qwen3-MoE, and transformers as the judge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from engine_tools import Publisher, Weights, engine_options, shared_memory
from safetensors.torch import load_file, save_file

from megatron_sglang.engine import create_engine
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF folder of the example's model, or of a random one of its shape where the example has no weights."""
    if (EXAMPLE / "model.safetensors").exists():
        return EXAMPLE
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    folder = tmp_path_factory.mktemp("model")
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def weights(tiny_model: Path) -> Weights:
    """The model's tensors under their HF names, fp32."""
    return {name: tensor.float() for name, tensor in load_file(tiny_model / "model.safetensors").items()}


@pytest.fixture(scope="session")
def other_weights(weights: Weights) -> Weights:
    """Other weights of the same shapes, different in every tensor."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator) + 1e-4
        for name, tensor in weights.items()
    }


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    """The session's server, with no weights yet. It must leave nothing in /dev/shm when it ends well."""
    log_path = str(tmp_path_factory.mktemp("engine") / "engine.log")
    with create_engine(engine_options(tiny_model, log_path=log_path)) as running:
        assert running.server.pid is not None
        shared = shared_memory(running.server.pid)
        assert len(shared) == 2, shared
        sampling = SamplingParams(max_new_tokens=4, seed=1)
        running.warm_up([GenerateRequest((5, 6, 7), sampling)] * 3)  # as a run on a GPU does, with what is in memory
        yield running
    assert not [path for path in shared if path.exists()]


@pytest.fixture(scope="session")
def publish(engine: HttpEngine) -> Publisher:
    return Publisher(engine)


@pytest.fixture(scope="session")
def rescore(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Weights, Sequence[GenerateRequest], Sequence[Completion]], list[torch.Tensor]]:
    """transformers' logprobs of completions under given weights and each request's temperature."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("rescore")
    shutil.copy(tiny_model / "config.json", folder)

    def score(
        weights: Weights, requests: Sequence[GenerateRequest], completions: Sequence[Completion]
    ) -> list[torch.Tensor]:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        scores = []
        for request, completion in zip(requests, completions, strict=True):
            ids = torch.tensor([request.token_ids_T + completion.token_ids_T])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.token_ids_T) - 1 : -1]
            logprobs = (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)
            scores.append(logprobs.gather(1, torch.tensor(completion.token_ids_T)[:, None])[:, 0])
        return scores

    return score
