"""What a train step takes, in seconds and memory, with how many layers recomputed and how many tokens a micro-batch.

    torchrun --nproc-per-node 2 benchmarks/recompute.py --config conf/tiny_cpu.yaml --layers 2 1 0 --tokens 256
    torchrun --nproc-per-node 2 benchmarks/recompute.py --config conf/qwen3_30b_fim_gspo_h200.yaml --as-on 8 \\
        model.hf_path=examples/qwen3_30b_a3b model.random_weights=true --output recompute.json

One process, one setting after the other: Megatron's --recompute-method block computes the first N layers again in the
backward pass and keeps what the others have made. A setting whose memory would not fit, going by the two before it, is
left out. With --as-on N a rank has the experts and samples that it would have on N GPUs: the model gets as many
experts less, and a train step as many samples less, as there are fewer ranks; a token still goes to as many experts.
What differs from N GPUs is the exchange of tokens, which is between fewer.

All other arguments are pretrain_gspo.py's. Samples are random tokens of the longest length that the configuration
allows. No engine is started. Seconds are rank 0's, with the device waited for, of the train step alone; memory is that
of the fullest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cycle import spread
from launch import write
from training_efficiency import GB, Trainer

from megatron_sglang import config_load, host
from megatron_sglang.bench import result
from megatron_sglang.hf_files import EXPERTS

if TYPE_CHECKING:
    from megatron_sglang.config import RunConfig

ROOM = 0.92
"""Of the device's memory, which a setting may be expected to take: other processes and the allocator want theirs."""


def share(config: RunConfig, ranks: int, as_on: int, folder: Path) -> list[str]:
    """Arguments by which one of `ranks` has what it would have on `as_on`. folder: for the smaller model's files."""
    smaller = shutil.copytree(config.model.hf_path, folder / "model")
    described = json.loads((smaller / "config.json").read_text())
    name = next(name for name in EXPERTS if name in described)
    described[name] = described[name] * ranks // as_on
    (smaller / "config.json").write_text(json.dumps(described))
    batch = int(config.megatron.get("global-batch-size", config.rollout.samples)) * ranks // as_on
    prompts = batch // config.rollout.samples_per_prompt
    sizes = [f"--global-batch-size={batch}", f"rollout.prompts_per_batch={prompts}"]
    return [f"model.hf_path={smaller}", f"--expert-model-parallel-size={ranks}", *sizes]


class Settings:
    """Takes train steps of one model at one setting after the other."""

    def __init__(self, trainer: Trainer) -> None:
        from megatron.training import get_args

        self.trainer, self.args = trainer, get_args()
        self.config: Any = trainer.trained[3]
        self.config.recompute_granularity, self.config.recompute_method = "full", "block"

    def measure(self, tokens: int, layers: int, steps: int) -> dict[str, Any]:
        """tokens of a micro-batch on a rank, layers recomputed -> seconds of a step and peaks of memory."""
        import torch

        from megatron_sglang.training import micro_batches

        self.args.max_seqlen_per_dp_cp_rank, self.config.recompute_num_layers = tokens, layers
        trainer, on_gpu = self.trainer, torch.cuda.is_available()
        trainer.batches = micro_batches.of_this_rank(trainer.cycle.samples, self.args)
        if on_gpu:
            torch.cuda.empty_cache()  # of the setting before
            torch.cuda.reset_peak_memory_stats()
        trainer.ours()
        seconds = [one for _ in range(steps) for one in trainer.ours()]
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
        allocated, reserved = (max(each) / GB for each in zip(*trainer.cycle.comm.gather(peaks), strict=True))
        in_a_step = sum(sample.length for sample in trainer.cycle.samples) / len(trainer.batches)
        found = spread(seconds)
        return {
            "tokens_of_a_micro_batch": tokens,
            "layers_recomputed": layers,
            "micro_batches": max(trainer.cycle.comm.gather(len(trainer.batches[0]))),
            "seconds_of_a_step": found | {"each": seconds},
            "tokens_per_s": in_a_step / found["median"],
            "allocated_peak_gb": allocated,
            "reserved_peak_gb": reserved,
        }


def sweep(settings: Settings, tokens: Sequence[int], layers: Sequence[int], steps: int) -> Iterator[dict[str, Any]]:
    """Each setting's result, from most layers recomputed to fewest: memory grows evenly with each that is not."""
    import torch

    memory = torch.cuda.mem_get_info()[1] / GB if torch.cuda.is_available() else float("inf")
    for each in tokens:
        before: list[tuple[int, float]] = []
        for number in sorted(set(layers), reverse=True):
            if len(before) > 1:
                (more, held), (fewer, holds) = before[-2:]
                expected = holds + (holds - held) / (more - fewer) * (fewer - number)
                if expected > ROOM * memory:
                    yield {"tokens_of_a_micro_batch": each, "layers_recomputed": number, "would_take_gb": expected}
                    continue
            found = settings.measure(each, number, steps)
            before.append((number, found["reserved_peak_gb"]))
            yield found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[12288, 24576], help="of a micro-batch on a rank")
    parser.add_argument("--layers", type=int, nargs="+", default=[48, 36, 24, 12, 0], help="recomputed")
    parser.add_argument("--steps", type=int, default=5, help="measured train steps of each, after one more (5)")
    parser.add_argument("--as-on", type=int, metavar="GPUS", help="have a rank's part of so many")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each setting")
    chosen, rest = parser.parse_known_args()
    for changed in host.prepare(os.environ):
        print(changed, file=sys.stderr)
    argv = [*rest, "--rollout-engine", "fake"]
    config = config_load.split_argv(argv).config
    ranks = int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory(prefix="megatron-sglang-") as folder:
        if chosen.as_on:
            argv += share(config, ranks, chosen.as_on, Path(folder))
            config = config_load.split_argv(argv).config

        import torch

        from megatron_sglang.cpu import trainer as cpu_room

        cpu_room.enter()
        settings = Settings(Trainer(config))
    fixed = {"versions": result.versions(), "device": result.device(), "ranks": ranks, "as_on": chosen.as_on or ranks}
    found: list[dict[str, Any]] = []
    for one in sweep(settings, chosen.tokens, chosen.layers, chosen.steps):
        found.append(one)
        if torch.distributed.get_rank() == 0:
            write("recompute.py", fixed | {"settings": found}, chosen.output)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
