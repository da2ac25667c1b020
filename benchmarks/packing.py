"""Padded micro-batches against packed ones on the same model and samples: loss, gradient, logprobs, tokens per second.

    python benchmarks/packing.py --budget 1024 --output benchmarks/results/packing_cpu.json
    torchrun --nproc-per-node 8 benchmarks/packing.py --budget 12288 --config conf/qwen3_30b_fim_gspo_h200.yaml \
      --hf-model MODEL --random-weights

The options but --budget, --steps, --output are those of pretrain_gspo.py; without any: the tiny model, fp32. Each
setting scores the samples of one train step and trains on them with a learning rate of 0, once to warm up and then
`steps` times. The samples are random tokens; lengths of prompt and completion are drawn from a beta distribution
(2, 3) of their limits. No engine is started. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_sglang import config_load, host
from megatron_sglang.config import RunConfig
from megatron_sglang.cpu import trainer as cpu_room

ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
TINY = ["--config", "conf/tiny_cpu.yaml", "--expert-model-parallel-size=1", "--micro-batch-size=16", "engine.tp_size=1"]
STILL = ["--lr=0", "--min-lr=0", "--lr-decay-style=constant"]


def measure(config: RunConfig, budget: int, steps: int) -> dict[str, Any]:
    """Both settings, and how far they are apart."""
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_sglang.losses import LossOptions
    from megatron_sglang.training.model import ModelRecipe
    from megatron_sglang.training.step import PolicyStep

    recipe = ModelRecipe(config)
    initialize._compile_dependencies = lambda: None
    training.initialize_megatron()
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=recipe.model_provider,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(recipe.args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    step = PolicyStep(config.algo.loss, LossOptions.of(config.algo, config.rollout.max_new_tokens), temperature=1.0)
    items = _samples(config, recipe.args.global_batch_size)
    found = {
        name: _setting(Namespace(**vars(recipe.args) | more), step, items, model, optimizer, scheduler, steps)
        for name, more in (("padded", {}), ("packed", {"max_seqlen_per_dp_cp_rank": budget}))
    }
    scored = {name: _of_all_ranks(values.pop("scored")) for name, values in found.items()}
    apart = torch.tensor([abs(scored["packed"][key] - value) for key, value in scored["padded"].items()] or [0.0])
    sums = [abs(value) for value in scored["padded"].values()] or [1.0]
    return {
        "ranks": torch.distributed.get_world_size(),
        "data_parallel": mpu.get_data_parallel_world_size(),
        "samples": len(items),
        "tokens": sum(item.length for item in items),
        "longest": max(item.length for item in items),
        "budget": budget,
        **found,
        "apart": {name: _apart(found, name) for name in ("loss", "grad_norm")}
        | {"largest_of_a_sample's_logprob": float(apart.max()), "mean_of_those": sum(sums) / len(sums)},
        "faster": found["packed"]["train_tokens_per_s"] / found["padded"]["train_tokens_per_s"],
    }


def _of_all_ranks(scored: dict[str, float]) -> dict[str, float]:
    """Samples of all data-parallel ranks, which packing deals out anew, with the parts of context-parallel ones."""
    from megatron.core import parallel_state as mpu

    from megatron_sglang.comm import TorchComm

    whole: dict[str, float] = {}
    for part in TorchComm().gather(scored if mpu.get_tensor_model_parallel_rank() == 0 else {}):
        for key, value in part.items():
            whole[key] = whole.get(key, 0.0) + value
    return whole


def _apart(found: dict[str, dict[str, Any]], name: str) -> float:
    return abs(found["packed"][name] - found["padded"][name]) / max(abs(found["padded"][name]), 1e-12)


def _setting(
    args: Namespace, step: Any, items: list[Any], model: list[Any], optimizer: Any, scheduler: Any, steps: int
) -> dict[str, Any]:
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import training

    from megatron_sglang import metrics
    from megatron_sglang.comm import TorchComm
    from megatron_sglang.training import logprobs
    from megatron_sglang.training.micro_batches import counted, of_this_rank
    from megatron_sglang.training.plugin import _rerunnable

    (batches,) = of_this_rank(items, args)
    config = training.get_model_config(model[0])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, training.finalize_model_grads
    run = counted(get_forward_backward_func(), len(batches))

    def train() -> Any:
        iterator = _rerunnable(model, batches)
        return training.train_step(
            step.forward_step, iterator, model, optimizer, scheduler, config, run, iteration=args.curr_iteration
        )

    args.curr_iteration = 0
    scored, score_s = _timed(lambda: logprobs.score(model, batches, 1.0), steps)
    # Old logprobs that no policy has: ratios differ from 1, and clips from sample to sample.
    if scored:
        batches = [
            batch.with_logprobs(old=old + 1e-3 * batch.rollout_logprobs, ref=old)
            for batch, old in zip(batches, scored, strict=True)
        ]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result, train_s = _timed(train, steps)
    rows = [metrics.to_rows(part) for part in step.take_metrics()] if mpu.get_tensor_model_parallel_rank() == 0 else []
    parts = metrics.merge(metrics.from_rows(row) for rank in TorchComm().gather(rows) for row in rank)
    tokens = sum(item.length for item in items)
    report = {
        "micro_batches": len(batches),
        "padding_on_a_rank": metrics.merge({"share": batch.padding()} for batch in batches)["share"].value(),
        "loss": parts["train/loss"].value() if parts else math.nan,
        "grad_norm": float(result[5]),
        "score_s": score_s,
        "train_s": train_s,
        "train_tokens_per_s": tokens / train_s,
        "scored": {
            repr(advantage): float((row.double() * mask).sum())
            for batch, found in zip(batches, scored, strict=False)
            for advantage, row, mask in zip(batch.advantages.tolist(), found, batch.loss_mask, strict=True)
        },
    }
    if torch.cuda.is_available():
        report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return report


def _timed(work: Callable[[], Any], steps: int) -> tuple[Any, float]:
    """What `work` gives and the mean of its seconds, after one more time to warm up."""
    import torch

    work()
    began = 0.0
    for number in range(steps + 1):
        torch.distributed.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number == 0:
            began = time.perf_counter()
        if number < steps:
            result = work()
    return result, (time.perf_counter() - began) / steps


def _samples(config: RunConfig, count: int) -> list[Any]:
    from megatron_sglang.types import TrainSample

    draw = random.Random(11)
    limits = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    made = []
    for _ in range(count):
        prompt, response = (
            tuple(draw.randrange(5, 400) for _ in range(1 + int(draw.betavariate(2, 3) * (limit - 1))))
            for limit in limits
        )
        made.append(TrainSample(prompt, response, tuple(-draw.random() for _ in response), draw.gauss(0, 1), 0.0, 1))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, required=True, help="tokens of a packed micro-batch, for each rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given, rest = parser.parse_known_args()
    host.prepare(os.environ)
    for name, value in (ONE_RANK | {"MASTER_PORT": "29511"}).items():
        os.environ.setdefault(name, value)
    cpu_room.enter()
    config = config_load.split_argv([*(rest or TINY), *STILL]).config

    import torch

    result = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}
    result |= {"torch": torch.__version__, "model": config.model.hf_path, "dtype": config.model.dtype}
    result |= measure(config, given.budget, given.steps)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # the last pipeline stage has the loss
        text = json.dumps(result, indent=1)
        print(text)
        if given.output:
            given.output.write_text(text + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
