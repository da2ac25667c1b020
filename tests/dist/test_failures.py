"""Bad input and lost parts end a run with one clear message, on all ranks, soon, and with nothing left behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sglang.trace import METRICS, read_lines

pytestmark = pytest.mark.dist

MODEL = Path("examples/tiny_fim/model")
BASE = shlex.split(
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=3 rollout.eval_samples=4 reward.name=function:letter_reward.vowels --micro-batch-size 2 "
    "--global-batch-size 8"
)
SOON_S = 150
"""What it is told from: waits of 300 s and more."""


def fails(run_ranks, run_dir: Path, *more: str, soon_s: float = SOON_S, **case: object) -> str:
    """Run two ranks that must fail in order; the message."""
    argv = [*BASE, f"log.run_dir={run_dir}", *more]
    ranks = run_ranks(2, "cases_failures.outcome", timeout_s=soon_s + 50, argv=argv, **case)
    assert [rank["code"] for rank in ranks] == [1, 1], ranks
    assert not any(rank["left"] or rank["children"] for rank in ranks), ranks
    assert max(rank["seconds"] for rank in ranks) < soon_s
    console = "".join(rank["console"] for rank in ranks)
    messages = re.findall(r"^rank \d: .*(?:\n.*)*", console, re.MULTILINE)
    assert len(re.findall(r"^rank \d: ", console, re.MULTILINE)) == 1, f"expected one message:\n{console}"
    assert "Traceback" not in console, console
    return messages[0]


def completes(run_ranks, run_dir: Path, **case: object) -> list[dict[str, float]]:
    """Run two ranks to the end; their records."""
    ranks = run_ranks(2, "cases_failures.outcome", argv=[*BASE, f"log.run_dir={run_dir}"], **case)
    assert [rank["code"] for rank in ranks] == [0, 0], ranks
    assert not any(rank["left"] or rank["children"] for rank in ranks), ranks
    return list(read_lines(run_dir / METRICS))


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


def test_model_that_bridge_does_not_know(run_ranks, tmp_path):
    folder = edited(tmp_path / "model", architectures=["NoSuchForCausalLM"])
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert f"DataError: Megatron-Bridge cannot read {folder}" in text


def test_config_json_of_another_model(run_ranks, tmp_path):
    """Sizes that only loading compares (tests/unit/test_hf_folder.py has the others)."""
    folder = edited(tmp_path / "model", moe_intermediate_size=32)
    text = fails(run_ranks, tmp_path / "run", f"model.hf_path={folder}")
    assert f"DataError: the weights in {folder} do not fit its config.json" in text


# ---- sizes and flags ----


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "--tensor-model-parallel-size=2 --expert-model-parallel-size=1",
            "--tensor-model-parallel-size=2 does not divide the 3 attention heads",
        ),
        ({"num_local_experts": 5}, "", "--expert-model-parallel-size=2 does not divide the 5 experts"),
        ({}, "--micro-batch-size=3", "--micro-batch-size=3 times 2 data-parallel ranks does not divide"),
        ({}, "--lr=fast", "argument --lr: invalid float value: 'fast'"),
        ({}, "--pipeline-model-parallel-size=3", "Megatron refuses these arguments: "),
        ({}, "--expert-modle-parallel-size=2", "did you mean --expert-model-parallel-size"),
    ],
    ids=["tp", "ep", "micro_batch", "no_number", "pp", "unknown"],
)
def test_sizes_and_flags_that_cannot_work(run_ranks, tmp_path, model, flags, said):
    """Those that only Megatron's parser or the model tells; tests/unit/test_config.py has the others."""
    folder = edited(tmp_path / "model", **model)
    more = [f"model.hf_path={folder}", "model.random_weights=true", *flags.split()]
    text = fails(run_ranks, tmp_path / "run", *more)
    assert "ConfigError: " in text
    assert said in text


# ---- data ----


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"prompt": "a", "data_source": "x"}\n{"prompt": "b"', "train.jsonl:2: not JSON"),
        (json.dumps({"prompt": "a = 1\n" * 200, "data_source": "x"}), "tokens; at most 72 fit"),
    ],
    ids=["cut", "long"],
)
def test_data_that_cannot_be_read(run_ranks, tmp_path, lines, said):
    """Only rank 0 reads it; the others must not wait for it in Megatron's set-up (tests/unit/test_prompts_source.py has
    more of them)."""
    path = tmp_path / "train.jsonl"
    path.write_text(lines)
    text = fails(run_ranks, tmp_path / "run", f"data.train={path}", "data.eval=")
    assert "rank 0: DataError: " in text
    assert said in text


def test_run_dir_that_cannot_be_made(run_ranks, tmp_path):
    """All ranks fail alike, before anything of a run is there; one of them says so."""
    (tmp_path / "run").write_text("a file")
    text = fails(run_ranks, tmp_path / "run")
    assert f"ConfigError: log.run_dir={tmp_path}/run cannot be written to: File exists; name another folder" in text


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


def test_engine_that_dies_whatever_it_is_asked(run_ranks, tmp_path):
    """Each time it is started again it dies of the same: that ends the run."""
    text = fails(run_ranks, tmp_path / "run", faults=[{"path": "/generate", "do": "die"}], soon_s=280)
    assert "died during /generate: exit code" in text
    assert "fake engine: scripted death" in text, "its last log lines"


@pytest.fixture(scope="module")
def undisturbed(run_ranks, tmp_path_factory) -> list[dict[str, float]]:
    return completes(run_ranks, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(("path", "after"), [("/generate", 2), ("/update_weights_from_tensor", 8)])
def test_engine_that_dies_in_a_run_is_started_again(run_ranks, tmp_path, undisturbed, path, after):
    """While it generates or takes weights: the batch it died in is sampled again, from the same weights."""
    disturbed = completes(run_ranks, tmp_path, faults=[{"path": path, "do": "die", "after": after}])
    assert sum(record.get("engine/deaths", 0) for record in disturbed) >= 1
    same = ("rollout/reward", "rollout/tokens", "train/loss", "train/grad_norm", "sync/version", "eval/reward")
    assert [{name: record.get(name) for name in same} for record in disturbed] == [
        {name: record.get(name) for name in same} for record in undisturbed
    ]


def test_port_that_something_else_has(run_ranks, tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        argv = [*BASE, f"log.run_dir={tmp_path / 'run'}", "engine.tp_size=1"]
        ranks = run_ranks(1, "cases_failures.outcome", argv=argv, port=port)
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
    assert re.match(rf"rank 0: DataError: the checkpoint of iteration \d could not be written to {small_disk} ", text)
    assert "(0 MB free)" in text
    complete = int((small_disk / "latest_checkpointed_iteration.txt").read_text())
    assert f"iteration {complete + 1} could not be written" in text
    resumed = [f"log.run_dir={tmp_path / 'run'}", f"--load={small_disk}"]
    assert run_ranks(2, "run", argv=[*BASE, *resumed]) == ["", ""]
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert iterations == [0, 1, 2, 3]


def test_what_a_failed_save_leaves_behind_is_collected(run_ranks):
    """CPython crashes over what Megatron's writer leaves: see `_forget_what_failed_writes_held`."""
    assert run_ranks(1, "cases_failures.failed_writes") == ["(0, OSError(28, 'No space left on device'))"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "rollout_state.json"])
def test_damaged_checkpoint(run_ranks, tmp_path, checkpoint, name):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "iter_0000001" / name).write_bytes(b"")
    text = fails(run_ranks, tmp_path / "run", f"--load={folder}", "--override-opt-param-scheduler")
    assert "DataError: " in text
    assert "cannot be read" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora.alpha=16", r"lora.alpha=32.0, this run has lora.alpha=16.0"),
        ("lora.rank=4", r"lora.rank=16, this run has lora.rank=4"),
        ("lora.targets=[linear_qkv]", r"lora.targets=\[.*'linear_fc2'\], this run has lora.targets=\['linear_qkv'\]"),
    ],
)
def test_a_checkpoint_with_other_adapters(run_ranks, tmp_path, checkpoint, given, said):
    """Another alpha fits in every shape, and would go on as another policy."""
    text = fails(run_ranks, tmp_path / "run", f"--load={checkpoint}", given)
    assert re.search(rf"DataError: the checkpoint {checkpoint}/iter_0000001 was saved with {said}; give", text)


def test_longer_run_from_a_checkpoint(run_ranks, tmp_path, checkpoint):
    text = fails(run_ranks, tmp_path / "run", f"--load={checkpoint}")
    assert "ConfigError: " in text
    assert "--override-opt-param-scheduler" in text


def test_a_missing_checkpoint_that_was_asked_for(run_ranks, tmp_path):
    """Megatron ends the process as if all had gone well, and says so in a log only."""
    text = fails(run_ranks, tmp_path / "run", f"--load={tmp_path / 'none'}", "--exit-on-missing-checkpoint")
    assert f"DataError: --exit-on-missing-checkpoint: --load {tmp_path / 'none'} holds no checkpoint; give" in text


def test_a_run_that_is_complete_says_so(run_ranks, tmp_path, checkpoint):
    """It ended without a word, like one that has trained."""
    more = [f"log.run_dir={tmp_path / 'run'}", f"--load={checkpoint}", "rollout.batches=1"]
    ranks = run_ranks(2, "cases_failures.outcome", argv=[*BASE, *more])
    assert [rank["code"] for rank in ranks] == [0, 0], ranks
    assert "nothing is left to train: the checkpoint in" in ranks[0]["console"]
    assert "rollout batches (1); ask for more with rollout.batches" in ranks[0]["console"]


def test_checkpoint_of_another_expert_parallel_size(run_ranks, tmp_path, checkpoint):
    more = ["--override-opt-param-scheduler", "--expert-model-parallel-size=1"]
    text = fails(run_ranks, tmp_path / "run", f"--load={checkpoint}", *more)
    assert f"ConfigError: the checkpoint in {checkpoint} has the optimizer of another layout" in text
    assert "--no-load-optim" in text


@pytest.fixture(scope="module")
def checkpoint(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After one rollout batch of a run whose command is also that of its continuation."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = folder / "save"
    more = [f"log.run_dir={folder / 'run'}", f"--save={save}", f"--load={save}", "--save-interval=1"]
    ranks = run_ranks(2, "cases_failures.outcome", argv=[*BASE, *more, "rollout.batches=1"])
    assert [rank["code"] for rank in ranks] == [0, 0], ranks
    assert f"--load {save}: there is no checkpoint in it, so the run begins anew" in ranks[0]["console"]
    return save
