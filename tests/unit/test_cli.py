"""`megatron-sglang`: what doctor finds, and how commands fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sglang import cli, doctor, host


def levels(check: str) -> dict[str, str]:
    return {finding.subject: finding.level for finding in getattr(doctor, f"check_{check}")()}


def test_doctor_knows_the_pins_and_sees_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with another Megatron fails half a minute into a run, in a place that does not say why."""
    assert doctor.pins()["megatron-core"] == ("0.19.2", "")
    assert doctor.pins()["sglang"][1] == "sglang"
    assert set(levels("versions").values()) == {"ok"}
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "megatron-core" else installed(name))
    assert {name for name, level in levels("versions").items() if level == "bad"} == {"megatron-core"}


def test_doctor_sees_variables_that_break_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expandable segments make weight sharing fail on a GPU; torchrun's variables hang an engine started by hand."""
    for name in (*doctor.TORCHRUN_VARIABLES, *host.ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    assert set(levels("environment").values()) <= {"ok"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    monkeypatch.setenv("RANK", "0")
    found = levels("environment")
    assert (found["PYTORCH_ALLOC_CONF"], found["torchrun's variables"]) == ("bad", "warn")


def test_doctor_sees_a_proxy_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to the engine on 127.0.0.1 would go through the proxy."""
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    assert levels("network")["http_proxy"] == "warn"
    monkeypatch.setenv("no_proxy", "example.org, 127.0.0.1")
    assert "http_proxy" not in levels("network")


def test_doctor_tells_by_its_exit_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts call it before a run; each finding that is not ok comes with what to do."""
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_environment,))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert cli.main(["doctor"]) == 1
    assert "unset PYTORCH_CUDA_ALLOC_CONF" in capsys.readouterr().out
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert cli.main(["doctor"]) == 0


def test_errors_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback tells a user nothing that the message does not."""
    assert cli.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("DataError: ")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--target-modules", "linear_qkv,q_proj"], "lora.targets names 'q_proj'; expected some of linear_qkv,"),
        (["--target-modules", " , "], "lora.targets is empty"),
        (["--lora-rank", "0"], "lora.rank=0; expected above 0"),
        (["--lora-alpha", "0"], "lora.alpha=0.0; expected above 0"),
    ],
)
def test_adapters_of_nothing_are_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    """A checkpoint without adapters, or with the default rank where another was asked for, was called a success."""
    (tmp_path / "config.json").write_text("{}")
    given = ["--hf-model", str(tmp_path), "--save", str(tmp_path / "new")]
    assert cli.main(["convert", "to-megatron", *given, *words]) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_commands_import_only_what_they_need() -> None:
    """`megatron-sglang --help` must answer at once on a machine without a GPU stack."""
    code = (
        "import sys\nfrom megatron_sglang import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'matplotlib', 'megatron', 'sglang'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
