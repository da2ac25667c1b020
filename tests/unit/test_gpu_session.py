"""The script for a GPU host: what it would run, and that a step that fails or hangs costs its own time only."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, FLAGSHIP = ROOT / "scripts/gpu_sync_session.py", ROOT / "scripts/gpu_flagship_session.py"


@pytest.fixture(scope="module")
def session() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_sync_session", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_of_gpus_up_to_what_is_there() -> None:
    """The large model's layouts: experts over all trainer ranks, one engine rank beside each."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--gpus", "5"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    names = [line.split()[0] for line in said.splitlines() if "(at most" in line]
    assert names[:3] == ["doctor", "digest", "merge"]
    assert names[-6:] == ["soak", "methods", "experts", "paths-4", "paths-2", "paths-1"]
    assert [name for name in names if name.startswith("30b")] == ["30b-4", "30b-2", "30b-1"]
    large = next(line for line in said.splitlines() if "qwen3_30b_a3b" in line)
    assert "--engine-tp 4 --expert-model-parallel-size 4" in large
    assert "--random-weights --dtype bfloat16 --lora-rank 32 --moe-grouped-gemm" in large
    assert "--paths direct --bucket-bytes 240000000 --also-buckets 330000000 480000000 --also-buffers 2" in large


def test_the_flagships_steps_get_the_same_overrides() -> None:
    """A ratio of other batches than the run's would say nothing of it."""
    command = [sys.executable, str(FLAGSHIP), "rollout.max_new_tokens=512", "--lr", "2e-6", "--dry-run", "--gpus", "4"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    found = {said[line].split()[0]: said[line + 1] for line in range(0, len(said) - 1, 2)}
    compared = ["training", "recompute", "rollout", "dtypes", "optimizer", "layouts", "modes"]
    assert list(found) == ["doctor", "score", "flagship", "cycle", *compared, "replay", "agreement", "plan"]
    for name in ("flagship", "training", "rollout", "replay"):
        words = "engine.tp_size=4 --expert-model-parallel-size 4 --recompute-num-layers 36 rollout.max_new_tokens=512"
        assert f"{words} --lr 2e-6" in found[name]
    assert "--recompute-num-layers 36" in found["plan"]
    assert "--as-on 8" in found["recompute"]
    assert "--nproc-per-node 4" in found["training"]
    assert "--moe-enable-routing-replay" in found["replay"]


def test_a_step_that_is_none_is_refused() -> None:
    """An argument behind --only is taken for one: the run would have had other sizes than it was given."""
    command = [sys.executable, str(FLAGSHIP), "--gpus", "2", "--only", "flagship", "rollout.max_new_tokens=512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no step: rollout.max_new_tokens=512; expected some of doctor, score, flagship," in done.stdout


def test_one_step_cannot_spend_the_others_time(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hang on a borrowed machine; afterwards nothing of it runs, and a second call repeats only what failed."""
    marks = tmp_path / "marks"
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(chr(123) + chr(125)); "
    mark = f"open({str(marks)!r}, 'a').write('good ')"
    hang = f"import os, time; open({str(marks)!r}, 'a').write(str(os.getpid()) + ' '); time.sleep(60)"
    planned = [
        session.Step("hangs", (sys.executable, "-c", hang), 1, {}),
        session.Step("fails", (sys.executable, "-c", "raise SystemExit('no such GPU')"), 20, {}),
        session.Step("good", (sys.executable, "-c", write + mark, "{result}"), 20, {}),
        session.Step("long", (sys.executable, "-c", ""), 10_000, {}),
    ]
    monkeypatch.setattr(session, "steps", lambda *_: planned)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--gpus", "1", "--deadline-s", "100"])
    assert session.main() == 1
    records = {record["step"]: record for record in json.loads((tmp_path / "session.json").read_text())}
    assert records["hangs"]["status"] == "ended after 1 s"
    assert records["fails"]["status"] == 1
    assert "no such GPU" in records["fails"]["said"]
    assert (records["good"]["status"], records["good"]["result"]) == (0, {})
    assert "long: not started" in capsys.readouterr().out
    pid = marks.read_text().split()[0]
    assert not Path(f"/proc/{pid}").exists()
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--gpus", "1", "--only", "good", "fails"])
    session.main()
    assert marks.read_text().split().count("good") == 1


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_the_session_ends_its_step(tmp_path: Path, sign: signal.Signals) -> None:
    """A step in a session of its own outlived a lost connection, and nobody was left who knew its deadline."""
    mark = tmp_path / "mark"
    hang = f"import os, time; print(os.getpid(), file=open({str(mark)!r}, 'w')); time.sleep(60)"
    program = f"""import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_sync_session as session
session.steps = lambda *_: [session.Step("hangs", (sys.executable, "-c", {hang!r}), 50, {{}})]
sys.argv = ["", "--out", {str(tmp_path)!r}, "--gpus", "1"]
session.main()"""
    with subprocess.Popen([sys.executable, "-c", program]) as script:
        deadline = time.monotonic() + 30
        while not (mark.exists() and mark.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        step = psutil.Process(int(mark.read_text()))
        script.send_signal(sign)
        script.wait(45)
    try:
        assert not psutil.wait_procs([step], 5)[1]
    finally:
        if step.is_running():
            step.kill()
    assert script.returncode == 128 + sign
