#!/usr/bin/env python3
"""What the flagship has to show on a GPU host, in one go: python scripts/gpu_flagship_session.py [--dry-run]

Each step runs under its own deadline; one that fails or hangs costs its own time only.

    doctor     what of this host will not work
    score      logprobs by the Triton kernels against torch's (benchmarks/score_speed.py)
    flagship   examples/run_qwen3moe_30b_fim_gspo.sh with random weights for --cycles rollout batches
    cycle      where its time and memory went (benchmarks/cycle.py), also if it was cut off
    plan       the memory that was predicted for it
    training   our train step against plain Megatron's (benchmarks/training_efficiency.py)
    recompute  a train step with more and fewer layers recomputed (benchmarks/recompute.py)
    rollout    our rollout against a bare client (benchmarks/rollout_efficiency.py)
    dtypes     trainer's and engine's logprobs in fp32 and bf16, routing replay off and on (benchmarks/agreement.py)
    optimizer  Adam on the CPU against Adam on the GPU (benchmarks/optimizer_offload.py)
    layouts    one train step in every layout of two GPUs (benchmarks/layouts.py); with two or more
    modes      every rollout mode with the demo's model (benchmarks/modes.py); with two or more
    replay     flagship again for four batches, with routing replay
    agreement  of trainer and engine in it, and its times (benchmarks/cycle.py)

Further arguments, given first, are pretrain_gspo.py's and go to flagship, training, rollout and replay:
rollout.max_new_tokens=512 rollout.prompts_per_batch=32. Results go to OUT (--out, else $OUT, else build/gpu_flagship):
session.json, written after each step, session.log with all output, run/ with what the run left. A second call goes on
where the first one stopped (--again NAME repeats a step). With --deadline-s no step is started that may not end in
time. --rehearse runs the same program on a CPU with two ranks and the small model: it proves the script, not the
numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_sync_session import COMMAND, LARGE, Step, add_arguments, session

TARGETS = {"ours_over_bare": 0.98, "ours_over_plain": 0.97, "switch_s_on_8": 1.0, "memory_off_plan": 0.1}
CONFIG = "conf/qwen3_30b_fim_gspo_h200.yaml"
SMALL = """
model.dtype=float32 rollout.prompts_per_batch=4 --global-batch-size 16 --micro-batch-size 2
rollout.max_new_tokens=16 data.max_prompt_tokens=72 lora.rank=8 megatron.moe-grouped-gemm=false
sglang.max_total_tokens=16384 sglang.mem_fraction_static=0.1 reward.workers=1
""".split()  # noqa: SIM905
"""The large model's configuration, cut down to a small one on a CPU."""
GPUS = 8
"""What the configuration is for."""
RECOMPUTED, RECOMPUTED_ON_FEWER = 12, 36
"""Layers: the configuration's, and where fewer GPUs hold more of the experts each."""


def steps(
    gpus: int, cycles: int, out: Path, model: str, overrides: Sequence[str], *, rehearse: bool = False
) -> list[Step]:
    """gpus: how many there are; rehearsing, ranks on the CPU. model: folder with a config.json."""
    python = sys.executable
    environment = {"CUDA_VISIBLE_DEVICES": ""} if rehearse else cudnn()
    sizes = (f"engine.tp_size={gpus}", "--expert-model-parallel-size", str(gpus))
    layers = ("--recompute-num-layers", str(RECOMPUTED if gpus >= GPUS else RECOMPUTED_ON_FEWER))
    words = (*sizes, *layers, *(SMALL if rehearse else ()), *overrides)
    run_dir = str(out.resolve() / "run")
    script = {"MODEL": model, "DATA": "examples/tiny_fim/train.jsonl", "OUT": run_dir, "RANDOM_WEIGHTS": "1"}
    script |= {"PRESET": "h200", "NPROC": str(gpus), "PYTHON": python}
    launcher = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus))
    config = ("--config", CONFIG, f"model.hf_path={model}", "model.random_weights=true", *words)
    flagship = ("bash", "examples/run_qwen3moe_30b_fim_gspo.sh", "--no-save-optim", *words)
    plan = (python, "-c", COMMAND, "plan", model, "--nproc", str(gpus), "--expert-model-parallel-size", str(gpus))
    plan += ("--micro-batch-size", "1", "--sequence-tokens", "12288", "--memory-saver", *layers)
    output = ("--output", "{result}")
    as_on = ("--layers", "4", "2", "--tokens", "512") if rehearse else ("--as-on", str(GPUS))
    replay_dir = str(out.resolve() / "run_replay")
    replay = (*flagship, "--num-rollout", "4", "--moe-enable-routing-replay")
    first = environment | {"CUDA_VISIBLE_DEVICES": "0"}
    dtypes = ("benchmarks/agreement.py", "--layers", "4", "--nproc", "1", "--batches", "5", "--timeout-s", "140")
    one = [
        Step("dtypes", (python, *dtypes, *output), 580, first),
        Step("optimizer", (python, "benchmarks/optimizer_offload.py", "--timeout-s", "280", *output), 580, first),
    ]
    both = [
        Step("layouts", (python, "benchmarks/layouts.py", "--at-once", "4", *output), 580, environment),
        Step("modes", (python, "benchmarks/modes.py", "--at-once", "5", *output), 580, environment),
    ]
    score = (
        python,
        "benchmarks/score_speed.py",
        *(("--rows", "8", "--vocabulary", "500") if rehearse else ()),
        *output,
    )
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}
    return [
        Step("doctor", (python, "-c", COMMAND, "doctor"), 120, environment, result=False),
        Step("score", score, 240, environment | interpreter),
        Step("flagship", (*flagship, "--num-rollout", str(cycles)), 580, environment | script, result=False),
        Step("cycle", (python, "benchmarks/cycle.py", run_dir, *output), 120, environment),
        Step("training", (*launcher, "benchmarks/training_efficiency.py", *config, *output), 580, environment),
        Step("recompute", (*launcher, "benchmarks/recompute.py", *as_on, *config, *output), 400, environment),
        Step("rollout", (python, "benchmarks/rollout_efficiency.py", "--nproc", str(gpus), *config, *output), 580,
             environment),
        *([] if rehearse else one),
        *(both if gpus > 1 and not rehearse else []),
        Step("replay", replay, 580, environment | script | {"OUT": replay_dir}, result=False),
        Step("agreement", (python, "benchmarks/cycle.py", replay_dir, *output), 120, environment),
        Step("plan", plan, 400, {"CUDA_VISIBLE_DEVICES": ""}, result=False),
    ]  # fmt: skip


def cudnn() -> dict[str, str]:
    """So that Transformer Engine finds the environment's cuDNN, as the flagship's script sets it."""
    for one in importlib.metadata.distributions(name="nvidia-cudnn-cu13"):
        home = str(one.locate_file("nvidia/cudnn"))
        libraries = [f"{home}/lib", *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"CUDNN_HOME": home, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, "gpu_flagship")
    parser.add_argument("--cycles", type=int, default=6, help="rollout batches of the run, the first is warm-up (6)")
    chosen, overrides = parser.parse_known_args()

    def steps_of(gpus: int, tiny: str) -> list[Step]:
        model = tiny if chosen.rehearse else LARGE
        return steps(gpus, chosen.cycles, chosen.out, model, overrides, rehearse=chosen.rehearse)

    return session(chosen, steps_of, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
