"""Every rollout mode on the real SGLang, three batches of the demo each: the same rewards, and the time of an update.

    python benchmarks/modes.py --output benchmarks/results/modes_h200_2.json

Each is a run of pretrain_gspo.py by torchrun (`RUNS`), fp32, all with the demo's model, data and seeds; seeds belong to
requests, so every run must sample what the demo samples: its first rewards are `EXPECTED` (on a GPU nearly). Wants two
GPUs, Transformer Engine and SGLang; without a GPU the same runs on the CPU. Prints JSON; exits with 1 where a run
failed, sampled something else or left memory on a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch import TIMEOUT_S, environment, interruptible, launch, torchrun, write

from megatron_sglang.trace import METRICS, read_lines

ONE = ("--expert-model-parallel-size", "1", "engine.tp_size=1")
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "split, direct": (1, (*ONE, "--rollout-mode", "split")),
    "split, broadcast": (1, (*ONE, "--rollout-mode", "split", "sync.method=broadcast")),
    "shared": (1, (*ONE, "--rollout-mode", "shared")),
    "colocated, two engines": (2, ("engine.tp_size=1",)),
    "colocated, merge-on-engine": (2, ("sync.method=merge-on-engine",)),
}
"""Trainer ranks, and arguments beside `ALL`."""
ALONE = ("shared",)
"""Runs that want a device for themselves: they see whether memory that was released comes back."""
ALL = (
    "--config",
    "conf/tiny_cpu.yaml",
    "rollout.batches=3",
    "rollout.eval_interval=0",
    "data.eval=",
    "engine.update_timeout_s=60",
)
ON_GPUS = ("--attention-backend", "unfused", "--no-gradient-accumulation-fusion", "--moe-grouped-gemm",
           "--sglang-attention-backend", "triton", "sglang.mem_fraction_static=0.5", "sglang.disable_cuda_graph=true",
           "sync.bucket_bytes=1000000")  # fmt: skip
EXPECTED = (0.377, 0.412)
"""Mean rewards of the demo's first two batches, to three digits (README)."""
APART = {"cpu": 0.0006, "gpu": 0.05}
"""How far from them a run may be. A GPU multiplies fp32 as TF32: a few of a batch's 512 samples take another turn."""


def run(name: str, work: Path, gpus: bool, timeout_s: int) -> dict[str, Any]:
    ranks, arguments = RUNS[name]
    folder = work / "".join(letter for letter in name if letter.isalnum())
    wanted = (*ALL, *arguments, *(ON_GPUS if gpus else ()), f"log.run_dir={folder}")
    command = torchrun(ranks, "pretrain_gspo.py", "--rollout-engine", "sglang", *wanted)
    env = environment()
    if name == "shared" and gpus:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    began = time.monotonic()
    with (work / f"{folder.name}.log").open("w+") as log:
        status = launch(command, timeout_s=timeout_s, env=env, log=log).returncode
        log.seek(0)
        said = log.read()
    found: dict[str, Any] = {"ranks": ranks, "arguments": " ".join(arguments), "status": status}
    found["seconds"] = round(time.monotonic() - began, 1)
    lines = [line for line in read_lines(folder / METRICS) if "timing_s/train" in line] if folder.exists() else []
    for key in ("rollout/reward", "train/logprob_gap_mean", "timing_s/sync", "timing_s/train"):
        found[key] = [line.get(key) for line in lines]
    apart = [abs(one - other) for one, other in zip(found["rollout/reward"], EXPECTED, strict=False)]
    found["alike"] = status == 0 and len(apart) == 2 and max(apart) <= APART["gpu" if gpus else "cpu"]
    if not found["alike"]:
        logs = {path.name: path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))}
        found["said"] = {name: text[-4000:].splitlines() for name, text in {"console": said, **logs}.items()}
    print(f"{name}: {'alike' if found['alike'] else 'NOT ALIKE'}, {found['seconds']} s", file=sys.stderr, flush=True)
    return found


def used_mb() -> list[int]:
    """Of each GPU's memory; empty without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    return [int(line) for line in done.stdout.split()] if done.returncode == 0 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other, `ALONE` after them (1)")
    parser.add_argument("--timeout-s", type=int, default=TIMEOUT_S, help=f"of each ({TIMEOUT_S})")
    given = parser.parse_args()

    before = used_mb()
    runs = {}
    with interruptible(), tempfile.TemporaryDirectory() as temporary:
        for alone, at_once in ((False, given.at_once), (True, 1)):
            wanted = [name for name in given.only if (name in ALONE) == alone]
            with ThreadPoolExecutor(at_once) as pool:
                done = pool.map(lambda name: run(name, Path(temporary), bool(before), given.timeout_s), wanted)
                runs |= dict(zip(wanted, done, strict=True))
    left = [after - was for was, after in zip(before, used_mb(), strict=True)]
    found = {"gpus": len(before), "expected_rewards": EXPECTED, "memory_left_mb": left, "runs": runs}
    write("modes.py", found, given.output)
    return 0 if all(one["alike"] for one in runs.values()) and all(size < 64 for size in left) else 1


if __name__ == "__main__":
    sys.exit(main())
