"""Do trainer and engine give the tokens just sampled the same probability? fp32 and bf16, routing replay off and on.

    python benchmarks/agreement.py [--batches 8] [--output benchmarks/results/agreement_cpu.json]
    python benchmarks/agreement.py --layers 4 --nproc 1 --batches 5 [pretrain_gspo.py's arguments] --output gpu.json

Runs conf/tiny_cpu.yaml, with the given arguments, for some rollout batches in each setting, and writes for each of
them the means over its batches (the maximum: over all tokens) and each batch's own number of what docs/algorithm.md
calls gap, kl_rollout, token_mult_prob_error and routing_disagreement (that one with replay only: else nobody asks the
engine). --layers: on one GPU, Qwen3-30B-A3B's shape with so many layers and random weights instead of the demo's model.
About a minute a run on two idle cores.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Any

from launch import ROOT, interruptible, launch, random_model, torchrun, write
from modes import ON_GPUS, ONE

from megatron_sglang.bench import result
from megatron_sglang.trace import METRICS, read_lines

REPLAY = ["--moe-enable-routing-replay"]
RUNS = {
    f"{dtype}, replay {'on' if replay else 'off'}": [f"model.dtype={dtype}", *replay]
    for dtype in ("float32", "bfloat16")
    for replay in ([], REPLAY)
}
ON_GPU = (*ONE, *ON_GPUS, "sync.method=direct", "sync.bucket_bytes=480000000", "data.eval=", "rollout.eval_interval=0")
MEANS = ("logprob_gap_mean", "kl_rollout", "token_mult_prob_error", "routing_disagreement")


def run(arguments: list[str], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The agreement of one run."""
    program = ["pretrain_gspo.py", "--rollout-engine", "sglang", "--config", "conf/tiny_cpu.yaml"]
    more = [f"rollout.batches={given.batches}", "rollout.eval_samples=16", f"log.run_dir={folder}", *arguments]
    launch(torchrun(given.nproc, *program, *more), timeout_s=given.timeout_s).check_returncode()
    train = [record for record in read_lines(folder / METRICS) if "train/loss" in record]
    by_batch = {
        name: [record[f"train/{name}"] for record in train]
        for name in ("logprob_gap_max", *MEANS)
        if f"train/{name}" in train[0]
    }
    found: dict[str, Any] = {name: sum(values) / len(values) for name, values in by_batch.items()}
    found["logprob_gap_max"] = max(by_batch["logprob_gap_max"])
    return found | {"tokens": sum(record["rollout/tokens"] for record in train), "by_batch": by_batch}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--nproc", type=int, default=2, help="trainer ranks (2)")
    parser.add_argument("--layers", type=int, help="of Qwen3-30B-A3B's shape with random weights")
    parser.add_argument("--timeout-s", type=int, default=900, help="of each run (900)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/agreement_cpu.json")
    given, arguments = parser.parse_known_args()
    results = {}
    for name, setting in RUNS.items():
        with interruptible(), tempfile.TemporaryDirectory() as folder:
            model = (*ON_GPU, *random_model(given.layers, Path(folder, "model"))) if given.layers else ()
            results[name] = run([*setting, *model, *arguments], given, Path(folder, "run"))
        fixed = {"machine": platform.machine(), "batches": given.batches, "versions": result.versions()}
        write("agreement.py", fixed | {"runs": results}, given.output)


if __name__ == "__main__":
    main()
