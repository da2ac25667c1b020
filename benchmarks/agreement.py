"""Do trainer and engine give the tokens just sampled the same probability? fp32 and bf16, routing replay off and on.

    python benchmarks/agreement.py [--batches 8] [--output benchmarks/results/agreement_cpu.json]

Runs conf/tiny_cpu.yaml for some rollout batches in each setting, and writes for each of them the means over its batches
(the maximum: over all tokens) and each batch's own number of what docs/algorithm.md calls gap, kl_rollout,
token_mult_prob_error and routing_disagreement (that one with replay only: else nobody asks the engine).
About a minute a run on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPLAY = ["--moe-enable-routing-replay"]
RUNS = {
    f"{dtype}, replay {'on' if replay else 'off'}": [f"model.dtype={dtype}", *replay]
    for dtype in ("float32", "bfloat16")
    for replay in ([], REPLAY)
}
MEANS = ("logprob_gap_mean", "kl_rollout", "token_mult_prob_error", "routing_disagreement")


def run(arguments: list[str], batches: int, folder: Path) -> dict[str, Any]:
    """The agreement of one run."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "pretrain_gspo.py"), "--rollout-engine", "sglang", "--config", "conf/tiny_cpu.yaml"]
    more = [f"rollout.batches={batches}", "rollout.eval_samples=16", f"log.run_dir={folder}", *arguments]
    subprocess.run([*launcher, *program, *more], cwd=ROOT, check=True, timeout=900)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    by_batch = {
        name: [record[f"train/{name}"] for record in train]
        for name in ("logprob_gap_max", *MEANS)
        if f"train/{name}" in train[0]
    }
    found: dict[str, Any] = {name: sum(values) / len(values) for name, values in by_batch.items()}
    found["logprob_gap_max"] = max(by_batch["logprob_gap_max"])
    return found | {"tokens": sum(record["rollout/tokens"] for record in train), "by_batch": by_batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/agreement_cpu.json")
    given = parser.parse_args()
    results = {}
    for name, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(arguments, given.batches, Path(folder, "run"))
        print(name, json.dumps(results[name]), flush=True)
    versions = {package: metadata.version(package) for package in ("torch", "sglang", "megatron-core")}
    record = {"command": " ".join(sys.argv), "machine": platform.machine(), "batches": given.batches}
    given.output.write_text(json.dumps(record | {"versions": versions, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
