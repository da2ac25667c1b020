"""Does it learn, and the same in every layout? Runs conf/tiny_cpu.yaml in several layouts, and with shuffled rewards.

    python benchmarks/tiny_learning.py [--only ep2,tp2] [--output benchmarks/results/tiny_learning.json]

Writes one JSON with the held-out curves, the largest trainer-engine logprob gap and the seconds of each run, and
docs/figures/tiny_learning.png. About two minutes a run on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

from launch import ROOT, interruptible, launch, torchrun

_ONE = ["--expert-model-parallel-size", "1"]
RUNS: dict[str, tuple[int, list[str]]] = {
    "ep2": (2, []),
    "ep2 again": (2, []),
    "world1": (1, [*_ONE, "engine.tp_size=1"]),
    "tp2": (2, [*_ONE, "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, [*_ONE, "--pipeline-model-parallel-size", "2"]),
    "shuffled rewards": (2, ["algo.shuffle_rewards=true"]),
}
"""Name -> (ranks, arguments added to the demo's)."""


def run(ranks: int, arguments: list[str], folder: Path) -> dict:
    program = [str(ROOT / "pretrain_gspo.py"), "--rollout-engine", "sglang", "--config", "conf/tiny_cpu.yaml"]
    began = time.perf_counter()
    more = ["rollout.eval_interval=5", f"log.run_dir={folder}", *arguments]
    command = torchrun(ranks, *program, *more)
    launch(command, timeout_s=1800, env=os.environ).check_returncode()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "held_out": {str(r["iteration"]): round(r["eval/pass_rate"], 4) for r in records if "eval/pass_rate" in r},
        "reward": [round(record["rollout/reward"], 4) for record in train],
        "kl_first_step": train[0]["train/kl_ref"],
        "logprob_gap_max": [record["train/logprob_gap_max"] for record in train],
        "logprob_gap_mean": [record["train/logprob_gap_mean"] for record in train],
        "families": {
            name.removeprefix("eval/pass_rate/"): [records[0][name], round(records[-1][name], 4)]
            for name in records[0]
            if name.startswith("eval/pass_rate/")
        },
    }


def plot(results: dict, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, found in results.items():
        steps = sorted(map(int, found["held_out"]))
        style = "--" if name == "shuffled rewards" else "-"
        axes.plot(steps, [found["held_out"][str(step)] for step in steps], style, marker=".", label=name)
    axes.set(xlabel="rollout batches trained on", ylabel="held-out pass rate (576 problems, T=1)", ylim=(0, 0.8))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tiny_learning.json")
    chosen = parser.parse_args()
    report = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for name in chosen.only.split(","):
        ranks, arguments = RUNS[name]
        print(f"== {name}", flush=True)
        with interruptible(), tempfile.TemporaryDirectory() as folder:
            report.setdefault("runs", {})[name] = run(ranks, arguments, Path(folder))
        packages = ("torch", "megatron-core", "megatron-bridge", "sglang")
        report["versions"] = {package: metadata.version(package) for package in packages}
        report["machine"] = f"{platform.machine()}, CPU"
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")
    plot(report["runs"], ROOT / "docs/figures/tiny_learning.png")


if __name__ == "__main__":
    main()
