"""Routing replay with the real parts: SGLang tells what transformers' routers choose, and Megatron agrees with it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from engine_tools import Publisher, Weights, engine_options, until_decoding

from megatron_sglang.batching import expert_numbers
from megatron_sglang.engine import create_engine
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
LAYERS, TOP_K = 4, 2


@pytest.fixture(scope="module")
def telling(tiny_model: Path, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    """An engine that tells experts, with a prefix cache."""
    log_path = str(tmp_path_factory.mktemp("telling") / "engine.log")
    extra = {"disable_radix_cache": False}
    with create_engine(engine_options(tiny_model, log_path=log_path, routed_experts=True, extra=extra)) as running:
        Publisher(running)(weights)
        yield running


def requests(count: int = 8, tokens: int = 24, start: int = 0) -> list[GenerateRequest]:
    """Prompts of different lengths, one seed each."""
    return [
        GenerateRequest(
            tuple((index * 7 + place * 3) % 500 + 5 for place in range(10 + index)),
            SamplingParams(max_new_tokens=tokens, seed=index),
            routing_from=start,
        )
        for index in range(count)
    ]


def chosen(tiny_model: Path, request: GenerateRequest, completion: Completion) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets of experts [tokens but the last, layers, top_k] that transformers chooses, and how near the next one was."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(torch.tensor([request.token_ids_T + completion.token_ids_T]), output_router_logits=True)
    top = torch.stack(list(found.router_logits), dim=1)[:-1].topk(TOP_K + 1)
    return top.indices[..., :TOP_K].sort().values, top.values[..., TOP_K - 1] - top.values[..., TOP_K]


def test_the_engine_tells_what_transformers_chooses(telling: HttpEngine, tiny_model: Path) -> None:
    """Rows of another token, another layer or another request would agree by chance only."""
    asked = requests()
    for request, completion in zip(asked[:3], telling.generate(asked)[:3], strict=True):
        assert completion.routed_experts is not None
        told = expert_numbers(completion.routed_experts).unflatten(1, (LAYERS, TOP_K)).long()
        expected, margin = chosen(tiny_model, request, completion)
        clear = margin > 1e-4
        assert clear.float().mean() > 0.95
        assert torch.equal(told.sort().values[clear], expected[clear])


def test_however_it_is_asked_the_engine_tells_the_same(telling: HttpEngine) -> None:
    """With cached prefixes, streamed, in two requests, from a later token on: each row is that of its token."""
    asked = requests()
    first = telling.generate(asked)
    assert [one.routed_experts for one in telling.generate(asked)] == [one.routed_experts for one in first]

    def rows(completion: Completion) -> torch.Tensor:
        assert completion.routed_experts is not None
        return expert_numbers(completion.routed_experts)

    async def others(request: GenerateRequest) -> list[Completion]:
        least = dataclasses.replace(request.sampling, min_new_tokens=5)
        async with telling.client() as client, telling.client() as closing:
            whole = await client.generate(request)
            later = await client.generate(dataclasses.replace(request, routing_from=7))
            two = await client.generate(dataclasses.replace(request, sampling=least))
            closing._locate = lambda: [dataclasses.replace(one, admin_key="") for one in telling.addresses]
            return [whole, later, two, await closing.generate(request)]

    for request, completion in zip(asked[:4], first[:4], strict=True):
        expected = rows(completion)
        whole, later, two, streamed = asyncio.run(others(request))
        assert torch.equal(rows(whole), expected)
        assert torch.equal(rows(streamed), expected)
        assert torch.equal(rows(later), expected[7:])
        assert len(rows(two)) == len(request.token_ids_T) + len(two.token_ids_T) - 1
        assert torch.equal(rows(two)[: len(request.token_ids_T)], expected[: len(request.token_ids_T)])


def test_an_aborted_completion_tells_what_was_processed(telling: HttpEngine) -> None:
    """Resumed rollouts ask for the rest only, and so depend on every row being there."""
    asked = requests(tokens=200)

    async def aborted() -> list[Completion]:
        async with telling.client() as client:
            tasks = [asyncio.create_task(client.generate(request)) for request in asked]
            await until_decoding(telling, 4)
            await client.abort()
            return list(await asyncio.gather(*tasks))

    completions = asyncio.run(aborted())
    assert any(one.finish_reason == "abort" and one.token_ids_T for one in completions)
    for request, completion in zip(asked, completions, strict=True):
        if completion.token_ids_T:
            assert completion.routed_experts is not None
            assert completion.routed_experts.tokens == len(request.token_ids_T) + len(completion.token_ids_T) - 1


@pytest.mark.parametrize(
    "layout",
    [
        ["rollout.prompts_per_batch=8", "--micro-batch-size=16"],
        ["--tensor-model-parallel-size=2", "--sequence-parallel", "--global-batch-size=128", "--micro-batch-size=32"],
    ],
    ids=["ep2", "tp2_two_steps"],
)
def test_a_run_replays_and_the_trainer_agrees(tmp_path: Path, layout: list[str]) -> None:
    """In fp32 Megatron's routers choose what SGLang's chose, for every token and layer; anything else is misaligned."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    command += ["pretrain_gspo.py", "--config", "conf/tiny_cpu.yaml", "--rollout-engine", "sglang", "rollout.batches=2"]
    command += ["rollout.eval_samples=4", f"log.run_dir={tmp_path}", "--moe-enable-routing-replay", *layout]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = [record for record in records if "train/loss" in record]
    assert first["train/routing_disagreement"] == 0.0
    assert second["train/routing_disagreement"] < 1e-3  # a second step's routers may have moved
    for record in (first, second):
        assert record["train/logprob_gap_max"] < 1e-5
        assert record["train/kl_rollout"] < 1e-10
        assert 1.0 <= record["train/token_mult_prob_error"] < 1.00001
