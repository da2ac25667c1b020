"""examples/run_qwen3moe_30b_fim_gspo.sh without a GPU: every parameter that it promises, and what it gives the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/run_qwen3moe_30b_fim_gspo.sh"
GIVEN = {"MODEL": "examples/qwen3_30b_a3b", "DATA": "examples/tiny_fim/train.jsonl", "RANDOM_WEIGHTS": "1"}

SEED = {
    "lora.rank": 32,
    "lora.alpha": 64,
    "megatron.tensor-model-parallel-size": 2,
    "megatron.pipeline-model-parallel-size": 2,
    "megatron.context-parallel-size": 2,
    "megatron.expert-model-parallel-size": 4,
    "megatron.expert-tensor-parallel-size": 1,
    "algo.loss": "gspo",
    "algo.advantage": "grpo",
    "algo.clip_low": None,
    "algo.clip_high": None,
    "algo.kl_coef": 0.001,
    "algo.kl_estimator": "k3",
    "algo.entropy_coef": 0,
    "data.max_prompt_tokens": 2048,
    "rollout.max_new_tokens": 1024,
    "rollout.samples_per_prompt": 4,
    "rollout.prompts_per_batch": 64,
    "megatron.global-batch-size": 16 * 4,
    "megatron.micro-batch-size": 2,
    "megatron.lr": 1e-6,
    "rollout.engine": "sglang",
    "engine.tp_size": 8,
    "sglang.mem_fraction_static": 0.25,
    "sglang.disable_cuda_graph": True,
    "sglang.enable_memory_saver": True,
    "megatron.recompute-granularity": "full",
    "megatron.recompute-method": "uniform",
    "megatron.recompute-num-layers": 1,
    "reward.timeout_s": 30,
    "reward.workers": 4,
    "megatron.save-interval": 10,
    "rollout.eval_interval": 0,  # 5 with EVAL_DATA
    "rollout.batches": 10 * (1440 // 64),
    "model.random_weights": True,
}
"""The parameters of verl's script of this name; clip ranges: those of GSPO, which are the loss's own."""
SAME_TASK = "lora. algo. data. rollout. megatron.global megatron.lr megatron.save model. sglang.enable"
H200 = {name: value for name, value in SEED.items() if name.startswith(tuple(SAME_TASK.split()))} | {
    "megatron.tensor-model-parallel-size": None,
    "megatron.pipeline-model-parallel-size": None,
    "megatron.context-parallel-size": None,
    "megatron.expert-model-parallel-size": 8,
    "megatron.micro-batch-size": 1,
    "megatron.expert-tensor-parallel-size": 1,
    "megatron.max-seqlen-per-dp-cp-rank": 12288,
    "megatron.recompute-granularity": "full",
    "megatron.recompute-method": "block",
    "megatron.recompute-num-layers": 12,
    "engine.tp_size": 8,
    "engine.deterministic": False,
    "sglang.disable_cuda_graph": None,
    "sglang.mem_fraction_static": 0.3,
    "reward.timeout_s": 30,
    "reward.workers": 16,
}


def run(folder: Path, *argv: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """The script, started in the repository."""
    given: dict[str, str | None] = {**os.environ, **GIVEN, "OUT": str(folder / "out"), "PYTHON": sys.executable}
    given |= environment
    env = {name: value for name, value in given.items() if value is not None}
    command = ["bash", str(SCRIPT), *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)


def value(config: Any, name: str) -> Any:
    section, key = name.split(".")
    return config[section].get(key)


@pytest.mark.parametrize(("preset", "expected"), [("seed", SEED), ("h200", H200)])
def test_a_dry_run_shows_every_parameter(tmp_path: Path, preset: str, expected: dict[str, Any]) -> None:
    """A default that drifts away from the script it stands for is a comparison of two different runs."""
    done = run(tmp_path, "--dry-run", PRESET=preset)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text, _, plan = done.stdout.partition("# ranks\n")
    config = OmegaConf.create(text.removeprefix("# configuration\n"))
    assert {name: value(config, name) for name in expected} == expected
    ranks, rest = plan.split("\n\n", 1)
    assert len(ranks.splitlines()) == 1 + 8
    assert "engine 0: beside trainer ranks 0, 1, 2, 3, 4, 5, 6, 7" in rest
    assert f"megatron-sglang plan {tmp_path / 'out/model'} --nproc 8 --engine-tp 8 " in rest
    assert f"--expert-model-parallel-size {expected['megatron.expert-model-parallel-size']} " in rest
    memory = {"seed": "--sequence-tokens 3072 --mem", "h200": "--sequence-tokens 12288 --recompute-num-layers 12 --mem"}
    assert memory[preset] in rest


def test_grpos_clip_range_with_gspo_is_warned_of(tmp_path: Path) -> None:
    """verl's script has it; sequence ratios never leave it, so nothing is ever clipped."""
    done = run(tmp_path, "--dry-run", "--eps-clip", "0.2", "--eps-clip-high", "0.28", "--rollout-batch-size", "32")
    assert done.returncode == 0
    config = OmegaConf.create(done.stdout.partition("# ranks\n")[0].removeprefix("# configuration\n"))
    assert value(config, "rollout.batches") == 10 * (1440 // 32), "as many passes, in other batches"
    assert "warning: algo.clip_low=0.2, algo.clip_high=0.28 suit the ratios of tokens (GRPO)" in done.stderr


def test_passes_over_parquet_are_counted_too(tmp_path: Path) -> None:
    """Or the run has the 30 batches of its configuration, whatever was asked for."""
    data = tmp_path / "train.parquet"
    rows = [{"id": str(number), "prompt": "a", "label": "b"} for number in range(130)]
    pq.write_table(pa.Table.from_pylist(rows), data)
    done = run(tmp_path, "--dry-run", DATA=str(data), EPOCHS="3")
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout.partition("# ranks\n")[0].removeprefix("# configuration\n"))
    assert value(config, "rollout.batches") == 3 * (130 // 64)
    data.write_text("not parquet")
    done = run(tmp_path, "--dry-run", DATA=str(data), EPOCHS="3")
    assert done.returncode == 1
    assert f"EPOCHS=3, but the rows of DATA={data} cannot be counted" in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MODEL": None}, "MODEL is not set; expected a folder in Hugging Face format"),
        ({"DATA": None}, "DATA is not set"),
        ({"OUT": None}, "OUT is not set"),
        ({"MODEL": "/nowhere"}, "MODEL=/nowhere has no config.json"),
        ({"DATA": "/nowhere"}, "DATA=/nowhere is not a file"),
        ({"EVAL_DATA": "/nowhere"}, "EVAL_DATA=/nowhere is not a file"),
        ({"PRESET": "b200"}, "PRESET=b200 is not known; expected seed or h200"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_what_is_missing_is_said_at_once(tmp_path: Path, environment: dict[str, Any], message: str) -> None:
    """Before anything is started, in one line."""
    done = run(tmp_path, **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert message in done.stderr


RECORDER = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":
    print(os.environ["FAKE_SITE"] + "/nvidia/cudnn")
else:
    json.dump([dict(os.environ), sys.argv[1:]], open(os.environ["RECORD"], "w"))
"""


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    """An interpreter that writes down with what it would be started, and has cuDNN beside it."""
    python, site = tmp_path / "python", tmp_path / "site"
    python.write_text(RECORDER)
    python.chmod(0o755)
    (site / "nvidia/cudnn/lib").mkdir(parents=True)
    return {"PYTHON": str(python), "FAKE_SITE": str(site), "RECORD": str(tmp_path / "record")}


def test_the_host_gets_what_it_needs(tmp_path: Path, recorder: dict[str, str]) -> None:
    """Each of these cost somebody a day: hangs, two cuDNNs in one process, memory that cannot be shared."""
    left = {"NVTE_FUSED_ATTN": "0", "RANK": "3", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": None, "no_proxy": None}
    given = {"EVAL_DATA": "examples/tiny_fim/heldout.jsonl", "LD_LIBRARY_PATH": "/x"}
    done = run(tmp_path, "--lr", "2e-6", **left, **given, **recorder)
    assert done.returncode == 0, done.stderr
    environment, argv = json.loads((tmp_path / "record").read_text())
    site = recorder["FAKE_SITE"]
    expected = {
        "MEGATRON_CI_DISABLE_EXPANDABLE_SEGMENTS": "1",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "True",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDNN_HOME": f"{site}/nvidia/cudnn",
        "LD_LIBRARY_PATH": f"{site}/nvidia/cudnn/lib:/x",
        "no_proxy": "127.0.0.1,localhost",
        "NVTE_FUSED_ATTN": None,
        "RANK": None,
        "MASTER_PORT": None,
    }
    assert {name: environment.get(name) for name in expected} == expected
    assert argv[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert argv[6:8] == ["--rollout-engine", "sglang"]
    assert "rollout.eval_interval=0" not in argv
    assert argv[-2:] == ["--lr", "2e-6"]


def test_a_config_alone_gets_a_tokenizer(tmp_path: Path, recorder: dict[str, str]) -> None:
    """Random weights need no tokenizer of their own, but prompts are made of something."""
    from megatron_sglang.prompts.source import load_prompts, load_tokenizer

    assert run(tmp_path, **recorder).returncode == 0
    tokenizer = load_tokenizer(tmp_path / "out/model")
    loaded = load_prompts(ROOT / GIVEN["DATA"], tokenizer, max_prompt_tokens=2048)
    assert len(loaded.prompts) == 1440
    assert isinstance(tokenizer.decode([5, 151000, 7]), str), "random weights sample ids that it does not know"
