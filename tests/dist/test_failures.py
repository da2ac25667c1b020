"""Bad input and lost parts end a run with one clear message, on all ranks, soon, and with nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

MODEL = Path("examples/tiny_fim/model")
BASE = (
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=3 rollout.eval_samples=4 reward.name=function:letter_reward.vowels --micro-batch-size 2 "
    "--global-batch-size 8"
).split()
SOON_S = 45


def fails(run_ranks, run_dir: Path, *more: str, **case: object) -> str:
    """Run two ranks that must fail in order; the message."""
    argv = [*BASE, f"log.run_dir={run_dir}", *more]
    ranks = run_ranks(2, "cases_failures.outcome", argv=argv, **case)
    assert [rank["code"] for rank in ranks] == [1, 1], ranks
    assert not any(rank["left"] or rank["children"] for rank in ranks), ranks
    assert max(rank["seconds"] for rank in ranks) < SOON_S
    console = "".join(rank["console"] for rank in ranks)
    messages = re.findall(r"^rank \d: .*(?:\n.*)*", console, re.MULTILINE)
    assert len(re.findall(r"^rank \d: ", console, re.MULTILINE)) == 1, f"expected one message:\n{console}"
    assert "Traceback" not in console, console
    return messages[0]


def edited(folder: Path, **changes: object) -> Path:
    """A copy of the model's folder with other values in config.json."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# ---- model folder ----


def test_no_model_folder(run_ranks, tmp_path):
    text = fails(run_ranks, tmp_path / "run", "model.hf_path=/nonexistent")
    assert "DataError: model.hf_path=/nonexistent has no config.json; give a folder in Hugging Face format" in text


def test_config_json_that_is_not_json(run_ranks, tmp_path):
    folder = edited(tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": [')
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert f"DataError: {folder}/config.json is not JSON" in text


def test_model_that_bridge_does_not_know(run_ranks, tmp_path):
    folder = edited(tmp_path / "model", architectures=["NoSuchForCausalLM"])
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert f"DataError: Megatron-Bridge cannot read {folder}" in text


@pytest.mark.parametrize("size", [4, 300, 100_000])
def test_truncated_safetensors(run_ranks, tmp_path, size):
    """An interrupted download must be named before a rank dies in the middle of loading."""
    folder = edited(tmp_path / "model")
    os.truncate(folder / "model.safetensors", size)
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert f"DataError: {folder}/model.safetensors has " in text
    assert "fetch the file again" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 256}, "says hidden_size=256, the weights have 128"),
        ({"num_hidden_layers": 2}, "says num_hidden_layers=2, the weights have 4"),
        ({"num_local_experts": 4}, "says num_local_experts=4, the weights have 8"),
        ({"num_experts": 16, "num_local_experts": 16}, "=16, the weights have 8"),
        ({"moe_intermediate_size": 32}, "do not fit its config.json"),
        ({"head_dim": 64}, "do not fit its config.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_json_of_another_model(run_ranks, tmp_path, changes, said):
    """Fewer experts or layers than the weights have would otherwise train, silently, another model."""
    folder = edited(tmp_path / "model", **changes)
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert "DataError: " in text
    assert said in text


# ---- sizes and flags ----


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--tensor-model-parallel-size=2 --expert-model-parallel-size=1", "--tensor-model-parallel-size=2 does not"),
        ("--expert-model-parallel-size=2", "--expert-model-parallel-size=2 does not divide the 5 experts"),
        ("--expert-tensor-parallel-size=2", "expert-tensor-parallel-size=2: adapters of experts are wrong above 1"),
        ("--context-parallel-size=2 --expert-model-parallel-size=1", "--context-parallel-size=2: Megatron's attention"),
        ("--micro-batch-size=3", "--micro-batch-size=3 times 2 data-parallel ranks does not divide"),
        ("--global-batch-size=3", "global-batch-size=3 does not divide the 8 samples of a rollout batch"),
        ("--lr=fast", "argument --lr: invalid float value: 'fast'"),
        ("--pipeline-model-parallel-size=3", "Megatron refuses these arguments: "),
        ("--expert-modle-parallel-size=2", "did you mean --expert-model-parallel-size"),
        ("rollout.batchs=2", "did you mean rollout.batches"),
    ],
)
def test_sizes_and_flags_that_cannot_work(run_ranks, tmp_path, more, said):
    changes = {}
    if "experts" in said and "divide" in said:
        changes = {"num_local_experts": 5, "num_experts": 5}
    if more.startswith("--tensor"):
        changes = {"num_attention_heads": 3, "num_key_value_heads": 3}
    model = [f"model.hf_path={edited(tmp_path / 'model', **changes)}", "model.random_weights=true"] if changes else []
    text = fails(run_ranks, tmp_path / "run", *model, *more.split())
    assert "ConfigError: " in text
    assert said in text


# ---- data ----


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "no prompt was read"),
        ('{"prompt": "a", "data_source": "x"}\n{"prompt": "b"', "train.jsonl:2: not JSON"),
        ('{"text": "a"}', "train.jsonl:1: row lacks 'prompt', it has text"),
        (json.dumps({"prompt": "a = 1\n" * 200, "data_source": "x"}), "tokens; at most 72 fit"),
        ('{"prompt": "a", "data_source": "x"}', "prompts_per_batch=4 with 1 prompts"),
    ],
    ids=["empty", "cut", "column", "long", "few"],
)
def test_data_that_cannot_be_read(run_ranks, tmp_path, lines, said):
    """Only rank 0 reads it; the others must not wait for it in Megatron's set-up."""
    path = tmp_path / "train.jsonl"
    path.write_text(lines)
    text = fails(run_ranks, tmp_path / "run", f"data.train={path}", "data.eval=")
    assert "rank 0: DataError: " in text or "rank 0: ConfigError: " in text
    assert said in text


# ---- rewards ----


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "failed for prompt"),
        ("hangs", "gave no answer in 1 s for prompt"),
        ("not_a_number", "it returned nan, expected a finite number"),
    ],
)
def test_reward_functions_with_faults(run_ranks, tmp_path, function, said):
    name = f"reward.name=function:faulty_reward.{function}"
    text = fails(run_ranks, tmp_path / "run", name, "reward.timeout_s=1")
    assert f"rank 0: RewardError: reward function faulty_reward.{function} " in text
    assert said in text


# ---- engine ----


def test_engine_that_dies_at_its_start(run_ranks, tmp_path):
    text = fails(run_ranks, tmp_path / "run", faults=[{"path": "start", "do": "die"}])
    assert "rank 0: EngineStartError: engine did not come up: exit code" in text
    assert "fake engine: scripted death at start" in text, "its last log lines"


@pytest.mark.parametrize("path", ["/generate", "/update_weights_from_tensor"])
def test_engine_that_dies_in_a_run(run_ranks, tmp_path, path):
    """In the second rollout batch, while it generates or takes weights."""
    text = fails(run_ranks, tmp_path / "run", faults=[{"path": path, "do": "die", "after": 2}])
    assert f"died during {path}: exit code" in text
    assert "fake engine: scripted death" in text, "its last log lines"


def test_port_that_something_else_has(run_ranks, tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        ranks = run_ranks(1, "cases_failures.outcome", argv=[*BASE, f"log.run_dir={tmp_path / 'run'}"], port=port)
    assert ranks[0]["code"] == 1
    assert f"SetupError: rank 0 cannot meet the others at 127.0.0.1:{port}" in ranks[0]["console"]
    assert "--master-port" in ranks[0]["console"]


# ---- what nobody foresaw ----


def test_a_bug_on_one_rank_is_the_message_of_the_run(run_ranks, tmp_path):
    """The other rank fails too, in a collective with a rank that is gone; that must not bury the cause."""
    text = fails(run_ranks, tmp_path / "run", break_at=1)
    assert text.startswith("rank 1: ZeroDivisionError: a bug")
    assert f"traceback: {tmp_path}/run/rank1.log" in text
    assert 'raise ZeroDivisionError("a bug")' in (tmp_path / "run" / "rank1.log").read_text()
    assert "ZeroDivisionError: a bug" in (tmp_path / "run" / "rank0.log").read_text()


# ---- disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_at_save_keeps_the_last_checkpoint(run_ranks, tmp_path, small_disk):
    """A save that fails half-way must not cost the one before it."""
    save = [f"--save={small_disk}", "--save-interval=1"]
    text = fails(run_ranks, tmp_path / "run", *save)
    print(text)
    assert "No space left on device" in text
