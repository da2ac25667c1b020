"""Adam on the CPU (`--optimizer-cpu-offload`) against Adam on the GPU: the same steps? In how much time and memory?

    python benchmarks/optimizer_offload.py [--layers 12] [--steps 6] [pretrain_gspo.py's arguments] --output FILE

Takes the same train steps three times, one process after the other on one GPU: Qwen3-30B-A3B's shape with fewer layers,
bf16 and random weights, by `ALL` and the given arguments; samples are random tokens with random advantages, the same in
each step (`training_efficiency.py`). Steps that differ in a rounding would soon be of different models: Adam's first
ones take of a gradient little more than its sign. So each step starts from the adapters that the first run had then,
rounded to bf16 in every run, with the optimizer's own state. After every step compares the adapters with those of the
first run, element by element:

    equal   share of all elements that are the same in bf16
    apart   |step - step of the first run| / |step of the first run|, L2 over all elements

The run `on the GPU again` is the first again, and shows what kernels that add up in any order leave to chance.

No engine is started. Seconds and memory are those of a train step, medians without the first one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
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
    *("rollout.max_new_tokens=256", "data.max_prompt_tokens=256", "--global-batch-size", "128"),
    *("--lr", "1e-4", "--min-lr", "1e-4", "--lr-decay-style", "constant", "algo.loss=grpo"),
)
FIRST = "on the GPU"
RUNS = {
    FIRST: (),
    "on the CPU": ("--optimizer-cpu-offload", "--use-precision-aware-optimizer"),
    "on the GPU again": (),
}


def take_steps(arguments: list[str], steps: int, state: Path, first: Path) -> None:
    """In a process of its own, under torchrun. Leaves in the folder `state` the adapters at the start and after each
    step, and what it took; each step starts from the adapters of the folder `first`."""
    for changed in host.prepare(os.environ):
        print(changed, file=sys.stderr)
    config = config_load.split_argv(arguments).config

    import torch
    from safetensors.torch import load_file, save_file

    from megatron_sglang.cpu import trainer as cpu_room

    cpu_room.enter()
    trainer = Trainer(config)
    assert len(trainer.batches) == 1, "a batch of samples is to be one train step"
    adapters = {name: each for name, each in trainer.model[0].named_parameters() if each.requires_grad}
    optimizer, on_gpu = trainer.optimizer, torch.cuda.is_available()
    assert optimizer is not None

    def keep(step: int) -> None:
        save_file({name: each.detach().cpu().contiguous() for name, each in adapters.items()}, state / f"{step}")

    keep(0)
    seconds, between, peaks = [], [], []
    for step in range(1, steps + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds += trainer.ours()
        between.append(torch.cuda.memory_allocated() / GB if on_gpu else 0.0)
        peaks.append(torch.cuda.max_memory_allocated() / GB if on_gpu else 0.0)
        keep(step)
        for name, each in load_file(first / f"{step}").items():
            adapters[name].data.copy_(each)
        optimizer.reload_model_params()
    took = {"seconds": seconds, "between_gb": between, "peak_gb": peaks}
    found = took | {"versions": result.versions(), "device": result.device()}
    (state / "took.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def compared(first: Path, other: Path, steps: int) -> list[dict[str, float]]:
    """For each step, from what two runs have left: see the module's docstring."""
    import torch
    from safetensors.torch import load_file

    device = "cuda" if torch.cuda.is_available() else "cpu"  # much faster, and free by now
    before, found = load_file(first / "0", device), []
    for step in range(1, steps + 1):
        after, instead = (load_file(folder / f"{step}", device) for folder in (first, other))
        found.append(apart(before, after, instead))
        before = after
    return found


def apart(before: Adapters, after: Adapters, instead: Adapters) -> dict[str, float]:
    """One step: from `before` to `after`, and to what the other run has `instead`."""
    equal = count = 0
    change = difference = 0.0
    for name, start in before.items():
        ours, others = after[name].double(), instead[name].double()
        equal += int((ours == others).sum())
        count += start.numel()
        change += float((ours - start.double()).square().sum())
        difference += float((ours - others).square().sum())
    return {"equal": equal / count, "apart": math.sqrt(difference / change), "change": math.sqrt(change)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=12, help="of the model (12)")
    parser.add_argument("--steps", type=int, default=6, help="of each run (6)")
    parser.add_argument("--timeout-s", type=int, default=TIMEOUT_S, help=f"of each run ({TIMEOUT_S})")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--states", type=Path, nargs=2, help=argparse.SUPPRESS)
    given, arguments = parser.parse_known_args()
    if given.states:
        take_steps(arguments, given.steps, *given.states)
        return
    with interruptible(), tempfile.TemporaryDirectory(prefix="megatron-sglang-") as temporary:
        model = random_model(given.layers, Path(temporary, "model"))
        first = Path(temporary, FIRST)
        runs: dict[str, Any] = {}
        for name, own in RUNS.items():
            state = Path(temporary, name)
            state.mkdir()
            options = ("--states", str(state), str(first), "--steps", str(given.steps))
            command = torchrun(1, __file__, *options, *ALL, *model, *arguments, *own)
            launch(command, timeout_s=given.timeout_s).check_returncode()
            took = json.loads((state / "took.json").read_text())
            runs[name] = took | {"seconds_median": statistics.median(took["seconds"][1:])}
            if name != FIRST:
                runs[name]["same_start"] = (state / "0").read_bytes() == (first / "0").read_bytes()
                runs[name]["steps"] = compared(first, state, given.steps)
            write("optimizer_offload.py", {"runs": runs}, given.output)


if __name__ == "__main__":
    main()
