"""Adam on the CPU (`--optimizer-cpu-offload`) against Adam on the GPU: the same steps? In how much time and memory?

    python benchmarks/optimizer_offload.py [--layers 12] [--batches 6] [pretrain_gspo.py's arguments] --output FILE

Takes the same train steps twice, one process after the other on one GPU: Qwen3-30B-A3B's shape with fewer layers, bf16
and random weights, by `ALL` and the given arguments; samples are random tokens with random advantages, the same in each
batch (`training_efficiency.py`). After every batch compares what the adapters have become, element by element:

    equal   share of all elements that are the same in bf16
    apart   |change on the CPU - change on the GPU| / |change on the GPU|, L2 over all elements since the start

No engine is started. Seconds are those of a batch's train steps, medians without the first batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import TIMEOUT_S, interruptible, launch, random_model, torchrun, write
from training_efficiency import GB, Trainer

from megatron_sglang import config_load, host
from megatron_sglang.bench import result

if TYPE_CHECKING:
    import torch

    Adapters = Mapping[str, torch.Tensor]

ALL = (
    *("--config", "conf/qwen3_30b_fim_gspo_h200.yaml", "--rollout-engine", "fake"),
    *("--expert-model-parallel-size", "1", "engine.tp_size=1", "rollout.prompts_per_batch=32"),
    *("rollout.max_new_tokens=256", "data.max_prompt_tokens=256", "--global-batch-size", "64"),
    *("--lr", "1e-4", "--min-lr", "1e-4", "--lr-decay-style", "constant", "algo.loss=grpo"),
)
RUNS = {"on the GPU": (), "on the CPU": ("--optimizer-cpu-offload", "--use-precision-aware-optimizer")}


def take_steps(arguments: list[str], batches: int, state: Path) -> None:
    """In a process of its own, under torchrun. Leaves in the folder `state` the adapters at the start and after each
    batch, and what it took."""
    for changed in host.prepare(os.environ):
        print(changed, file=sys.stderr)
    config = config_load.split_argv(arguments).config

    import torch
    from safetensors.torch import save_file

    from megatron_sglang.cpu import trainer as cpu_room

    cpu_room.enter()
    trainer = Trainer(config)
    adapters = {name: each for name, each in trainer.model[0].named_parameters() if each.requires_grad}
    on_gpu = torch.cuda.is_available()

    def keep(batch: int) -> None:
        save_file({name: each.detach().cpu().contiguous() for name, each in adapters.items()}, state / f"{batch}")

    keep(0)
    seconds, between, peaks = [], [], []
    for batch in range(1, batches + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(sum(trainer.ours()))
        between.append(torch.cuda.memory_allocated() / GB if on_gpu else 0.0)
        peaks.append(torch.cuda.max_memory_allocated() / GB if on_gpu else 0.0)
        keep(batch)
    took = {"train_steps": len(trainer.batches), "seconds": seconds, "between_gb": between, "peak_gb": peaks}
    found = took | {"versions": result.versions(), "device": result.device()}
    (state / "took.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def compared(states: Sequence[Path], batches: int) -> list[dict[str, float]]:
    """After each batch, from the folders of the run on the GPU and of that on the CPU: see the module's docstring."""
    from safetensors.torch import load_file

    start = load_file(states[0] / "0")
    return [apart(start, *(load_file(state / f"{batch}") for state in states)) for batch in range(1, batches + 1)]


def apart(start: Adapters, end_on_gpu: Adapters, end_on_cpu: Adapters) -> dict[str, float]:
    equal = count = 0
    change = difference = 0.0
    for name, before in start.items():
        on_gpu, on_cpu = end_on_gpu[name].double(), end_on_cpu[name].double()
        equal += int((on_gpu == on_cpu).sum())
        count += before.numel()
        change += float((on_gpu - before.double()).square().sum())
        difference += float((on_gpu - on_cpu).square().sum())
    return {"equal": equal / count, "apart": math.sqrt(difference / change), "change": math.sqrt(change)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=12, help="of the model (12)")
    parser.add_argument("--batches", type=int, default=6, help="of each run (6)")
    parser.add_argument("--timeout-s", type=int, default=TIMEOUT_S, help=f"of each run ({TIMEOUT_S})")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    given, arguments = parser.parse_known_args()
    if given.state:
        take_steps(arguments, given.batches, given.state)
        return
    with interruptible(), tempfile.TemporaryDirectory(prefix="megatron-sglang-") as temporary:
        model = random_model(given.layers, Path(temporary, "model"))
        runs: dict[str, Any] = {}
        states = []
        for name, own in RUNS.items():
            states.append(state := Path(temporary, name.replace(" ", "_")))
            state.mkdir()
            options = ("--state", str(state), "--batches", str(given.batches))
            command = torchrun(1, __file__, *options, *ALL, *model, *arguments, *own)
            launch(command, timeout_s=given.timeout_s).check_returncode()
            took = json.loads((state / "took.json").read_text())
            runs[name] = took | {"seconds_median": statistics.median(took["seconds"][1:])}
        alike = compared(states, given.batches)
        start = states[0] / "0", states[1] / "0"
        found = {"same_start": start[0].read_bytes() == start[1].read_bytes(), "after_batches": alike, "runs": runs}
    write("optimizer_offload.py", found, given.output)


if __name__ == "__main__":
    main()
