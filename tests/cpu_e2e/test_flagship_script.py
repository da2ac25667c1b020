"""The flagship's script as it runs, with a model that fits two CPU ranks: real Megatron, a real SGLang server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = """
model.dtype=float32 engine.tp_size=2 --expert-model-parallel-size 2 --num-rollout 2 rollout.prompts_per_batch=4
--global-batch-size 16 --micro-batch-size 2 rollout.max_new_tokens=16 data.max_prompt_tokens=72 lora.rank=8
megatron.moe-grouped-gemm=false sglang.max_total_tokens=16384 sglang.mem_fraction_static=0.1 reward.workers=1
""".split()  # noqa: SIM905


def test_a_config_alone_is_enough_to_run(tmp_path: Path) -> None:
    """Random weights, a borrowed tokenizer, an engine that gives its memory back: the first minute on a GPU host must
    not be spent on what a CPU can find."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    shutil.copy(ROOT / "examples/tiny_fim/model/config.json", model)
    given = {"MODEL": str(model), "DATA": "examples/tiny_fim/train.jsonl", "OUT": str(out), "RANDOM_WEIGHTS": "1"}
    given |= {"NPROC": "2", "PRESET": "h200", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    given["CUDA_VISIBLE_DEVICES"] = ""
    script = ROOT / "examples/run_qwen3moe_30b_fim_gspo.sh"
    done = subprocess.run(
        ["bash", str(script), *SMALL], cwd=ROOT, env=os.environ | given, capture_output=True, text=True, timeout=550,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weight sync: the direct path" in done.stdout
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [one["sync/version"] for one in records] == [1, 2, 3]
    assert all(one["train/logprob_gap_max"] < 1e-4 for one in records[:2])
    assert ["timing_s/release" in one for one in records] == [True, True, False]
    assert (out / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
