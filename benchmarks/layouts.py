"""One train step in every layout that two devices allow, padded and packed, must be the same one.

    python benchmarks/layouts.py --output benchmarks/results/layouts_h200_2.json

Loads one small Qwen3-MoE with each layout of `LAYOUTS` in a run of `benchmarks/packing.py` on two ranks, and compares
loss and gradient norm with those of the first. On GPUs: a model of random weights that transformers makes, bf16,
Transformer Engine, grouped experts. Without them: the example's model in fp32 on gloo ranks, and no context
parallelism, for which a CPU has no attention. Prints JSON; exits with 1 where one is further away than `LIMITS`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch import ROOT, interruptible, launch, torchrun, write

EP2 = ("--expert-model-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
LAYOUTS = {
    "EP2": EP2,
    "DP2": (),
    "TP2": TP2,
    "TP2 x EP2": (*TP2, *EP2),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "CP2": ("--context-parallel-size", "2"),
    "CP2 x EP2": ("--context-parallel-size", "2", *EP2),
    "EP2, full recompute": (
        *EP2, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
    ),
}  # fmt: skip
ON_GPUS = ("--moe-grouped-gemm", "--moe-token-dispatcher-type", "alltoall", "--moe-permute-fusion",
           "--no-gradient-accumulation-fusion")  # fmt: skip
LIMITS = {"float32": {"loss": 1e-5, "grad_norm": 1e-5}, "bfloat16": {"loss": 0.02, "grad_norm": 0.02}}
"""Relative; bf16 rounds each product at 4e-3."""
BUDGET = 1536
SHORT = ["data.max_prompt_tokens=72", "rollout.max_new_tokens=24"]
TINY = ROOT / "examples/tiny_fim/model"


def build_model(folder: Path) -> None:
    """Four layers, wide enough for the GPU's kernels."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def run(name: str, model: Path, work: Path, dtype: str, backend: str) -> dict[str, Any]:
    """The result of packing.py, or what it said when it failed."""
    result = work / f"{name.replace(' ', '')}.json"
    command = torchrun(2, "benchmarks/packing.py", "--budget", str(BUDGET), "--steps", "1", "--output", str(result))
    command += ["--hf-model", str(model), f"model.dtype={dtype}", "data.train=examples/tiny_fim/train.jsonl"]
    command += ["--global-batch-size", "32", "--micro-batch-size", "4", "engine.tp_size=1", "lora.rank=16"]
    command += ["data.max_prompt_tokens=192", "rollout.max_new_tokens=256"] if dtype == "bfloat16" else SHORT
    command += [*LAYOUTS[name], *(ON_GPUS if dtype == "bfloat16" else ()), "--attention-backend", backend]
    log = result.with_suffix(".log")
    with log.open("w") as output:
        status = launch(command, log=output).returncode
    if status or not result.exists():
        return {"failed": log.read_text()[-3000:].splitlines()}
    return json.loads(result.read_text())


def compared(found: dict[str, dict[str, Any]], dtype: str) -> tuple[dict[str, Any], bool]:
    """Each layout's numbers and how far they are from the first one's, relative; and whether all are near."""
    first = next(iter(found.values()))
    if "failed" in first:
        return found, False
    rows: dict[str, Any] = {}
    near = True
    for name, one in found.items():
        if "failed" in one:
            rows[name], near = one, False
            continue
        rows[name] = {}
        for kind in ("padded", "packed"):
            row = {key: one[kind][key] for key in ("loss", "grad_norm", "micro_batches", "train_tokens_per_s")}
            for key, limit in LIMITS[dtype].items():
                row[f"{key}_apart"] = abs(row[key] - first["padded"][key]) / abs(first["padded"][key])
                near = near and row[f"{key}_apart"] <= limit
            rows[name][kind] = row
    return rows, near


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), help="these, compared with the first of them")
    parser.add_argument("--at-once", type=int, default=1, help="layouts that run beside each other (1)")
    parser.add_argument("--attention-backend", default="auto")
    given = parser.parse_args()

    import torch

    on_gpus = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpus else "float32"
    names = given.only or [name for name in LAYOUTS if on_gpus or "CP2" not in name]
    with interruptible(), tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(given.at_once) as pool:
        work = Path(temporary)
        model = work / "model" if on_gpus else TINY
        if on_gpus:
            build_model(model)
        results = pool.map(lambda name: run(name, model, work, dtype, given.attention_backend), names)
        rows, near = compared(dict(zip(names, results, strict=True)), dtype)
    fixed = {
        "device": f"2 x {torch.cuda.get_device_name()}" if on_gpus else "CPU",
        "torch": torch.__version__,
        "dtype": dtype,
        "limits": LIMITS[dtype],
    }
    write("layouts.py", fixed | {"all_within_limits": near, "layouts": rows}, given.output)
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main())
