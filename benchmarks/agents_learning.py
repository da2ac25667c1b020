"""Does GSPO learn over several turns? Runs conf/tiny_repair.yaml and conf/tiny_tools.yaml, and with shuffled rewards.

    python benchmarks/agents_learning.py [--only "repair;tools"] [--output benchmarks/results/agents_learning.json]

Writes one JSON with the held-out curves and what the environments counted. Three to eight minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from launch import ROOT, interruptible, launch, torchrun

RUNS = {
    "repair": ["--config", "conf/tiny_repair.yaml"],
    "repair, shuffled rewards": ["--config", "conf/tiny_repair.yaml", "algo.shuffle_rewards=true"],
    "tools": ["--config", "conf/tiny_tools.yaml"],
    "tools, shuffled rewards": ["--config", "conf/tiny_tools.yaml", "algo.shuffle_rewards=true"],
}
"""Name -> arguments."""

COUNTED = (
    "rollout/reward",
    "rollout/turns",
    "rollout/tool_calls",
    "rollout/tool_errors",
    "rollout/first_attempt_passed",
)


def run(arguments: list[str], folder: Path) -> dict:
    program = [str(ROOT / "pretrain_gspo.py"), "--rollout-engine", "sglang", *arguments]
    more = ["rollout.eval_interval=10", f"log.run_dir={folder}"]
    command = torchrun(2, *program, *more)
    launch(command, timeout_s=3600, env=os.environ).check_returncode()
    return summary(folder)


def summary(folder: Path) -> dict:
    """Of the run in `folder`."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    evaluated = [record for record in records if "eval/pass_rate" in record]
    names = sorted(name for name in evaluated[0] if name.startswith("eval/") and "/pass_rate/" not in name)
    return {
        "seconds": round(sum(record["timing_s/iteration"] for record in records), 1),
        "batches": len(train),
        "held_out": {name: {str(r["iteration"]): round(r[name], 4) for r in evaluated if name in r} for name in names},
        "train": {name: [round(r[name], 4) for r in train] for name in COUNTED if name in train[0]},
        "logprob_gap_max": max(record["train/logprob_gap_max"] for record in train),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=";".join(RUNS), help="names, separated by ;")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/agents_learning.json")
    chosen, more = parser.parse_known_args()
    report = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for name in chosen.only.split(";"):
        print(f"== {name}", flush=True)
        with interruptible(), tempfile.TemporaryDirectory() as folder:
            report.setdefault("runs", {})[name] = {"arguments": more} | run([*RUNS[name], *more], Path(folder))
        packages = ("torch", "megatron-core", "megatron-bridge", "sglang")
        report["versions"] = {package: metadata.version(package) for package in packages}
        report["machine"] = f"{platform.machine()}, CPU"
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
