"""The environment of a GPU host: what is refused before a run, with the remedy, and what is put right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sglang import host
from megatron_sglang.config import RunConfig
from megatron_sglang.config_load import split_argv
from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.broadcast import Broadcast
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import SetupError, WeightSyncError

GOOD = {"LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def run_of(*argv: str) -> RunConfig:
    return split_argv(["model.hf_path=m", "data.train=t", *argv], local_world_size=8).config


def test_the_variables_of_verls_script_are_fine() -> None:
    """What its users export at the top of their scripts must not stop a run, nor be complained about."""
    exported = {host.NO_SEGMENTS: "1", host.RAY_NOSET: "1", host.OLD_BALANCE: "True"}
    assert host.judge(run_of("--tensor-model-parallel-size", "2"), GOOD | exported) == []
    said = {one.subject: one.observed for one in host.findings(GOOD | exported)}
    assert "balance check is off" in said[host.OLD_BALANCE]
    assert "only Ray reads it" in said[host.RAY_NOSET]


WRONG = {
    "segments": ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, [], "unset PYTORCH_CUDA_ALLOC_CONF"),
    "segments by the new name": (
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}, [], "unset PYTORCH_ALLOC_CONF",
    ),
    "one device": ({"CUDA_VISIBLE_DEVICES": "3"}, [], "1 devices (3) for 8 trainer ranks"),
    "devices hidden by Ray": (
        {"CUDA_VISIBLE_DEVICES": "0", "RAY_JOB_ID": "1"}, [], "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1",
    ),
    "CUDA stops at -1": ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2,3,4,5,6,7"}, [], "2 devices"),
    "a device twice": ({"CUDA_VISIBLE_DEVICES": "0,0,1,2,3,4,5,6,7"}, [], "name each once"),
    "connections": (
        {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, ["--context-parallel-size", "2"], "export CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    "attention by variable": ({"NVTE_FUSED_ATTN": "0"}, [], "unset NVTE_FUSED_ATTN"),
    "unfused attention with context parallelism": (
        {}, ["--context-parallel-size", "2", "--attention-backend", "unfused"], "needs fused or flash",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "argv", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_what_would_hang_or_fail_later_is_refused(environment: dict[str, str], argv: list[str], remedy: str) -> None:
    """Each costs minutes and ends in another process with a message about something else."""
    with pytest.raises(SetupError) as caught:
        host.judge(run_of(*argv), GOOD | environment)
    assert remedy in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    """Otherwise each attempt on a borrowed machine finds the next one."""
    with pytest.raises(SetupError) as caught:
        host.judge(run_of(), GOOD | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": "0"})
    assert len(str(caught.value).split(" | ")) == 2


def test_an_attention_variable_that_agrees_is_left_alone() -> None:
    """Megatron accepts it too."""
    assert host.judge(run_of("--attention-backend", "unfused"), GOOD | {"NVTE_FUSED_ATTN": "0"}) == []


def test_segments_are_taken_out_where_the_variable_asks_for_it() -> None:
    """MEGATRON_CI_DISABLE_EXPANDABLE_SEGMENTS=1 must do what it says, wherever they were switched on; only that."""
    environment = {
        host.NO_SEGMENTS: "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True,garbage_collection_threshold:0.8",
    }
    changed = host.prepare(environment)
    assert len(changed) == 2
    assert environment == {
        host.NO_SEGMENTS: "1",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64,garbage_collection_threshold:0.8",
    }
    left = {host.NO_SEGMENTS: "0", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert (host.prepare(left), len(left)) == ([], 2)


def test_the_trainers_allocator_rounds_where_nobody_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not over what a user has set, and not on a CPU."""
    monkeypatch.setattr(host, "DEVICE_FILES", (__file__,))
    mine = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    bare, segments = dict[str, str](), {host.NO_SEGMENTS: "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for environment in (bare, mine, segments):
        host.prepare(environment)
    assert bare == {"PYTORCH_ALLOC_CONF": host.ROUNDED}
    assert mine == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert segments == {host.NO_SEGMENTS: "1", "PYTORCH_ALLOC_CONF": host.ROUNDED}
    monkeypatch.setattr(host, "DEVICE_FILES", ("/nonexistent",))
    assert host.prepare(nothing := {}) == []
    assert nothing == {}


def test_torch_comes_after_the_environment() -> None:
    """It reads the allocator's variables once: what `prepare` takes out later stays in force."""
    code = "import pretrain_gspo, sys; from megatron_sglang import host; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == "False"


def test_nothing_is_asked_of_a_host_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU run may have any of them in its shell; and a GPU that is hidden is none."""
    monkeypatch.setattr(host, "DEVICE_FILES", ("/nonexistent",))
    assert host.check(run_of(), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}) == []
    monkeypatch.setattr(host, "DEVICE_FILES", (__file__,))
    assert host.check(run_of(), {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "8"}) == []
    with pytest.raises(SetupError):
        host.check(run_of(), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


class Site:
    """A site-packages with Transformer Engine and cuDNN, as far as their names go."""

    def __init__(self, folder: Path, cudnn: str) -> None:
        self.folder, self.lib = folder, folder / "nvidia/cudnn/lib"
        self.lib.mkdir(parents=True)
        (self.lib / "libcudnn.so.9").touch()
        for name, version in (("transformer_engine", "2.17.1"), ("nvidia_cudnn_cu13", cudnn)):
            info = folder / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            )

    def found(self, **environment: str) -> list[tuple[str, str]]:
        return [(one.level, f"{one.observed} {one.remedy}") for one in host.cudnn_findings(environment, self.folder)]


def test_both_variables_must_lead_to_the_environments_cudnn(tmp_path: Path) -> None:
    """With one of them alone the host's cuDNN comes in beside torch's, and the first attention fails."""
    site, hosts = Site(tmp_path / "site", host.CUDNN), tmp_path / "host/lib"
    hosts.mkdir(parents=True)
    (hosts / "libcudnn.so.9").touch()
    home, lib = str(site.folder / "nvidia/cudnn"), str(site.lib)
    assert [level for level, _ in site.found(CUDNN_HOME=home, LD_LIBRARY_PATH=f"/usr/lib/none:{lib}:{hosts}")] == ["ok"]
    for environment, wrong in (
        ({}, "CUDNN_HOME leads elsewhere and LD_LIBRARY_PATH leads elsewhere"),
        ({"CUDNN_HOME": home}, "LD_LIBRARY_PATH leads elsewhere"),
        ({"LD_LIBRARY_PATH": lib}, "CUDNN_HOME leads elsewhere"),
        ({"CUDNN_HOME": home, "LD_LIBRARY_PATH": f"{hosts}:{lib}"}, "LD_LIBRARY_PATH leads elsewhere"),
    ):
        [(level, text)] = site.found(**environment)
        assert (level, text.startswith(wrong)) == ("warn", True), text
        assert f"export CUDNN_HOME={home} LD_LIBRARY_PATH={lib}" in text


def test_another_cudnn_is_named_with_what_to_install(tmp_path: Path) -> None:
    """torch's own pin brings 9.19.0.56, with which fused attention was not run."""
    [(level, text), _] = Site(tmp_path, "9.19.0.56").found()
    assert level == "warn"
    assert f"nvidia-cudnn-cu13=={host.CUDNN}" in text
    assert "--attention-backend unfused" in text


def test_without_transformer_engine_cudnn_is_nobodys_matter(tmp_path: Path) -> None:
    assert list(host.cudnn_findings({}, tmp_path)) == []


@pytest.mark.parametrize(
    ("method", "given", "expected"), [("broadcast", {}, "0"), ("broadcast", {host.CUMEM: "1"}, "1"), ("auto", {}, None)]
)
def test_ranks_of_one_nccl_group_allocate_alike(
    method: str, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two H200s the first broadcast waited for ever: NCCL's default in the trainer is not what SGLang sets."""
    monkeypatch.setattr(host, "DEVICE_FILES", ("/dev/null",))
    environment = dict(given)
    host.share_nccl(split_argv(["model.hf_path=m", "data.train=t", f"sync.method={method}"]).config, environment)
    assert environment.get(host.CUMEM) == expected


def test_a_broadcast_that_would_hang_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(host.CUMEM, raising=False)
    link = Broadcast(HttpEngine(EngineOptions(str(tmp_path))))
    with pytest.raises(WeightSyncError, match="export NCCL_CUMEM_ENABLE=0 before"):
        link.open(torch.device("cuda"))
