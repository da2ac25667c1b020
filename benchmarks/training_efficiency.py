"""Our train step against plain Megatron's, in turns in one run, with the same model, flags and tokens.

    torchrun --nproc-per-node 2 benchmarks/training_efficiency.py --config conf/tiny_cpu.yaml --micro-batch-size 8
    torchrun --nproc-per-node 8 benchmarks/training_efficiency.py --config conf/qwen3_30b_fim_gspo_h200.yaml \\
        model.random_weights=true --output training.json

    ours    the plugin's own step (`training/plugin.py`): micro-batches, old and reference logprobs, then Megatron's
            train_step with our forward step, loss and guard, as often as a rollout batch has train steps
    plain   Megatron's train_step on the same tokens with pretrain_gpt's loss: the model computes cross entropy itself
    bridge  with --also-bridge: plain, and experts computed by Megatron-Bridge, one after the other, instead of by
            `training/grouped_lora.py`

All arguments but those of `--help` are pretrain_gspo.py's. Samples are random tokens of the longest length that the
configuration allows, so nothing is padding. No engine is started. Seconds are rank 0's, with the device waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cycle import TRAINING, spread

from megatron_sglang import config_load, host
from megatron_sglang.bench import result
from megatron_sglang.types import TrainSample

if TYPE_CHECKING:
    import torch

    from megatron_sglang.batching import MicroBatch
    from megatron_sglang.config import RunConfig

GB = 10**9


class FixedSamples:
    """Stands in for `Cycle`: every rollout batch is the same, published to nobody. Times the spans."""

    ledger = None
    version = 2
    """Later than that of the samples, whose logprobs are no engine's and need not agree."""

    def __init__(self, samples: list[TrainSample], comm: Any) -> None:
        self.samples, self.comm = samples, comm
        self.seconds: list[dict[str, float]] = []
        """By rollout batch."""

    def collect(self, _step: int) -> list[TrainSample]:
        self.comm.agree(None)
        self.seconds.append({})
        return self.samples

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        with _timed(took := []):
            yield
        self.seconds[-1][name] = self.seconds[-1].get(name, 0.0) + took[0]

    def state(self) -> dict[str, Any]:
        return {}

    def publish(self) -> None: ...
    def evaluate(self) -> None: ...
    def learning_rate(self) -> None: ...
    def add(self, _found: Any) -> None: ...
    def note_memory(self, _phase: str) -> None: ...
    def before_training(self) -> None: ...
    def close_step(self, _step: int) -> None: ...


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    import torch

    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)


class Trainer:
    """Megatron's set-up of model, optimizer and schedule, and both ways to take a step."""

    def __init__(self, config: RunConfig) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import initialize, training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_sglang.comm import TorchComm
        from megatron_sglang.losses import LossOptions
        from megatron_sglang.training import micro_batches
        from megatron_sglang.training.model import ModelRecipe
        from megatron_sglang.training.plugin import Plugin
        from megatron_sglang.training.step import PolicyStep
        from megatron_sglang.weights.merge import in_place

        initialize._compile_dependencies = lambda: None  # see training/plugin.py
        recipe = ModelRecipe(config)
        training.initialize_megatron()
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=recipe.model_provider,
            checkpointing_context={},
            cfg_container=pretrain_cfg_container_from_args(recipe.args),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.train_step = training.train_step
        config_of_model = training.get_model_config(self.model[0])
        config_of_model.grad_scale_func = self.optimizer.scale_loss
        config_of_model.finalize_model_grads_func = training.finalize_model_grads
        self.trained = self.model, self.optimizer, self.scheduler, config_of_model, get_forward_backward_func()
        """What both ways hand to Megatron's train_step."""
        self.cycle = FixedSamples(_samples(config, recipe.args.padded_vocab_size), TorchComm())
        step = PolicyStep(
            config.algo.loss, LossOptions.of(config.algo, config.rollout.max_new_tokens), config.rollout.temperature
        )
        cycle: Any = self.cycle
        self.plugin = Plugin(config, step, lambda *_: cycle, lambda chunks: in_place(recipe.bridge, chunks))
        self.batches = micro_batches.of_this_rank(self.cycle.samples, recipe.args)

    def seconds_of(self, way: str) -> list[float]:
        """Of each train step of a rollout batch."""
        return {"ours": self.ours, "plain": self.plain, "bridge": self.bridge}[way]()

    def ours(self) -> list[float]:
        """Seconds of each train step of a rollout batch; the spans before it are in `cycle.seconds`."""
        seconds: list[float] = []
        for _ in self.batches:
            before = self.cycle.seconds[-1].get("train", 0.0) if self.cycle.seconds and seconds else 0.0
            self.plugin._train_step(self.train_step, *self.trained, iteration=0)
            seconds.append(self.cycle.seconds[-1]["train"] - before)
        return seconds

    def plain(self) -> list[float]:
        """The same of plain Megatron."""
        from megatron_sglang.training.micro_batches import counted
        from megatron_sglang.training.plugin import _rerunnable

        seconds: list[float] = []
        self.cycle.comm.agree(None)
        *before, forward_backward = self.trained
        for batches in self.batches:
            # Packed micro-batches are fewer than Megatron counts.
            run = *before, counted(forward_backward, len(batches))
            with _timed(seconds):
                self.train_step(_plain_forward_step, _rerunnable(self.model, batches), *run, iteration=0)
        return seconds

    def bridge(self) -> list[float]:
        """The same without our grouped experts."""
        from megatron_sglang.training.grouped_lora import GroupedLoRALinear

        kept, GroupedLoRALinear.is_grouped = GroupedLoRALinear.is_grouped, lambda *_: False
        try:
            return self.plain()
        finally:
            GroupedLoRALinear.is_grouped = kept


def _plain_forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, functools.partial(_plain_loss, batch.loss_mask)


def _plain_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
    """pretrain_gpt's: summed over tokens that count, which Megatron divides by their number."""
    import torch

    loss = torch.sum(losses.float().view(-1) * mask.view(-1))
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def _samples(config: RunConfig, vocabulary: int) -> list[TrainSample]:
    """The same on all ranks."""
    draw = random.Random(config.seed)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    made = []
    for _ in range(config.rollout.samples):
        ids = [draw.randrange(5, vocabulary) for _ in range(prompt + response)]
        logprobs = tuple(-draw.random() for _ in range(response))
        made.append(TrainSample(tuple(ids[:prompt]), tuple(ids[prompt:]), logprobs, draw.gauss(0, 1), 0.0, 1))
    return made


def measure(trainer: Trainer, rounds: int, warm_up: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The result so far after each round: a run that is cut off keeps what it has measured."""
    import torch

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for number in range(warm_up + rounds):
        for name in seconds:
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            found = trainer.seconds_of(name)
            if torch.cuda.is_initialized():
                peaks[name] = max(trainer.cycle.comm.gather(torch.cuda.max_memory_allocated())) / GB
            seconds[name] += found if number >= warm_up else []
        if number < warm_up:
            continue
        tokens = sum(sample.length for sample in trainer.cycle.samples) / len(trainer.batches)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        phases = [_outermost(one) for one in trainer.cycle.seconds[warm_up:]]
        names = dict.fromkeys(name for one in trainer.cycle.seconds for name in one)
        yield {
            "tokens_of_a_step": tokens,
            "steps_of_a_rollout_batch": len(trainer.batches),
            "rounds": number + 1 - warm_up,
            "seconds_of_a_step": {name: spread(each) | {"each": each} for name, each in seconds.items()},
            "tokens_per_s": {name: tokens / median for name, median in medians.items()},
            **{f"ours_over_{name}": medians[name] / medians["ours"] for name in ways[1:]},
            "phases_of_a_rollout_batch": {
                name: spread([one.get(name, 0.0) for one in trainer.cycle.seconds[warm_up:]]) for name in names
            },
            "train_share_of_training": spread([one["train"] / sum(one.values()) for one in phases]),
            "allocated_peak_gb": peaks,
        }


def _outermost(seconds: dict[str, float]) -> dict[str, float]:
    """`old` and `reference` are parts of `logprobs`."""
    return {name: value for name, value in seconds.items() if name in TRAINING}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rollout batches (5)")
    parser.add_argument("--warm-up", type=int, default=1, help="rollout batches before them (1)")
    parser.add_argument("--also-bridge", action="store_true", help="measure Bridge's own experts too, on a GPU")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each round")
    args, rest = parser.parse_known_args()
    for changed in host.prepare(os.environ):
        print(changed, file=sys.stderr)
    # Without an engine nobody can be asked whether random tokens have these logprobs.
    config = config_load.split_argv([*rest, "--rollout-engine", "fake"]).config

    import torch

    from megatron_sglang.cpu import trainer as cpu_room

    cpu_room.enter()
    trainer = Trainer(config)
    leads = torch.distributed.get_rank() == 0
    fixed = {
        "command": "benchmarks/training_efficiency.py " + " ".join(sys.argv[1:]),
        "versions": result.versions(),
        "device": result.device(),
        "ranks": torch.distributed.get_world_size(),
        "configuration": dataclasses.asdict(config),
    }
    ways = ["ours", "plain", *(["bridge"] if args.also_bridge else [])]
    for found in measure(trainer, args.rounds, args.warm_up, ways):
        if leads:
            print(f"ours over plain: {found['ours_over_plain']:.3f}", found["tokens_per_s"], file=sys.stderr)
            if args.output:
                args.output.write_text(json.dumps(fixed | found, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
