"""Whole runs under a real torchrun that are stopped, killed, or lose a part: what is left, what the console says."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tiny_models import add_prediction_layer

pytestmark = pytest.mark.cpu_e2e

ROOT = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).with_name("torchrun")
ARGV = shlex.split(
    "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
    "rollout.batches=100000 rollout.eval_samples=4 --micro-batch-size 2 --global-batch-size 8"
)
THEIRS = re.compile(r"torchelastic_|torchinductor_|tmp\w+wandb-")
"""Folders that torchrun leaves always, torch as its cache, and wandb where a process is killed."""
PATIENCE_S = 240


@dataclass
class Run:
    """torchrun with two ranks, the fake engine and sandboxed rewards."""

    folder: Path
    argv: list[str]
    torchrun: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.temp = self.folder / "tmp"
        self.temp.mkdir(parents=True)
        self.console_file = self.folder / "console"
        self.run_dir = self.folder / "run"
        environment = {**os.environ, "TMPDIR": str(self.temp), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [str(TORCHRUN), "--standalone", "--nproc-per-node=2", "pretrain_gspo.py", *ARGV]
        with self.console_file.open("w") as console:
            self.torchrun = subprocess.Popen(
                [*command, f"log.run_dir={self.run_dir}", *self.argv],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    @property
    def console(self) -> str:
        return self.console_file.read_text()

    def until(self, what: Callable[[], object]) -> None:
        """Wait until `what` comes true; fails with the console when the run ends or time is up."""
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert self.torchrun.poll() is None, self.console
            assert time.monotonic() < deadline, self.console
            time.sleep(0.1)

    def until_trained(self, iterations: int = 1) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= iterations)

    def tree(self) -> list[psutil.Process]:
        """torchrun and all that lives under it."""
        top = psutil.Process(self.torchrun.pid)
        return [top, *top.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """By rank; [] while they are not started."""
        children = psutil.Process(self.torchrun.pid).children()
        found = {}
        for child in children:
            with contextlib.suppress(psutil.Error):
                if "pretrain_gspo.py" in child.cmdline():
                    found[child.environ()["RANK"]] = child
        return [found[rank] for rank in sorted(found)]

    def engine(self) -> psutil.Process:
        """The server, below its supervisor."""
        [supervisor] = [
            child for child in self.ranks()[0].children() if "megatron_sglang.engine.launch" in child.cmdline()
        ]
        [server] = supervisor.children()
        return server

    def assert_all_gone(self, tree: list[psutil.Process], within_s: float) -> None:
        """Nothing of `tree` runs, no port of it is open, nothing of ours is in the temporary folder."""
        _, alive = psutil.wait_procs(tree, timeout=within_s)
        assert not alive, ([(process.pid, process.cmdline()) for process in alive], self.console)
        assert [path.name for path in self.temp.iterdir() if not THEIRS.match(path.name)] == []

    def message(self) -> str:
        """The one message on the console."""
        [message] = re.findall(r"^rank \d: .*$", self.console, re.MULTILINE) or [self.console]
        return message


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a run in a folder of its name; all are ended with the test."""
    runs: list[Run] = []

    def start_run(name: str, *argv: str) -> Run:
        runs.append(Run(tmp_path / name, list(argv)))
        return runs[-1]

    yield start_run
    for run in runs:
        if run.torchrun.poll() is None:
            for process in run.tree():
                process.kill()
        run.torchrun.wait(10)


def test_signals_before_the_first_batch(start: Callable[..., Run]) -> None:
    """While ranks import Megatron and the engine and the sandbox are up. SIGTERM reaches torchrun alone, which passes
    it on; of SIGKILL nobody hears, and ranks that lived on would hold their devices. SIGINT comes in the next test."""
    runs = {name: start(name) for name in ("SIGTERM", "SIGKILL")}
    trees = {}
    for name, run in runs.items():
        run.until(lambda run=run: "training and" in run.console)
        trees[name] = run.tree()
        assert len(trees[name]) >= 6, "torchrun, two ranks, supervisor, server, sandbox"
        run.torchrun.send_signal(getattr(signal, name))
    for name, run in runs.items():
        code = run.torchrun.wait(25)
        assert code == (-9 if name == "SIGKILL" else 1), "torchrun makes 1 of every signal that it hears"
        run.assert_all_gone(trees[name], 20)
        assert ("stopped by SIGHUP" if name == "SIGKILL" else f"stopped by {name}") in run.console


def test_interrupt_while_training(start: Callable[..., Run]) -> None:
    run = start("run")
    run.until_trained()
    tree = run.tree()
    run.torchrun.send_signal(signal.SIGINT)
    run.torchrun.wait(25)
    run.assert_all_gone(tree, 15)
    assert "stopped by SIGINT" in run.console
    assert "rank 1" not in run.console.partition("stopped by")[0], "a rank that loses the others must not say so"


def test_megatron_saves_on_sigterm_if_asked(start: Callable[..., Run], tmp_path: Path) -> None:
    """The cluster's warning before it takes the machine: with --exit-signal-handler it must not cost a batch."""
    run = start("run", f"--save={tmp_path / 'save'}", "--save-interval=100000", "--exit-signal-handler")
    run.until_trained()
    tree = run.tree()
    run.torchrun.send_signal(signal.SIGTERM)
    run.torchrun.wait(40)
    run.assert_all_gone(tree, 15)
    saved = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert (tmp_path / "save" / f"iter_{saved:07d}" / "rollout_state.json").exists()


def test_killed_engine(start: Callable[..., Run]) -> None:
    """An engine that dies once is started again; one that dies as often as it is started ends the run, with the reason
    first and last on the console."""
    run = start("run")
    run.until_trained()
    run.engine().kill()
    run.until(lambda: "starting it again (1 of 3)" in run.console)
    trained = (run.run_dir / "metrics.jsonl").read_text().count("\n")
    run.until_trained(trained + 2)
    tree = run.tree()
    deadline = time.monotonic() + PATIENCE_S
    while run.torchrun.poll() is None:
        assert time.monotonic() < deadline, run.console
        with contextlib.suppress(psutil.Error, ValueError, IndexError):  # between two engines there is none
            run.engine().kill()
        time.sleep(0.2)
    assert run.torchrun.returncode == 1
    run.assert_all_gone(tree, 15)
    assert re.match(r"rank 0: \w+Error: .*(died|exit code)", run.message()), run.console
    assert "engine supervisor: the server process" in run.console, "the engine's last log lines"
    assert re.search(r"traceback : \w+Error: .*(died|exit code)", run.console.partition("Root Cause")[2]), run.console


def test_killed_leader(start: Callable[..., Run]) -> None:
    """Engine and sandbox notice by themselves that rank 0 is gone; torchrun ends the other rank."""
    run = start("run")
    run.until_trained()
    tree = run.tree()
    run.ranks()[0].kill()
    assert run.torchrun.wait(20) == 1
    run.assert_all_gone(tree, 15)
    assert "Signal 9 (SIGKILL)" in run.console.partition("Root Cause")[2], run.console


def test_a_model_with_a_layer_for_multi_token_prediction(start: Callable[..., Run], tmp_path: Path) -> None:
    """As the hub has GLM-4.5 and DeepSeek-V3. Megatron-Bridge gives the trainer such a layer, too."""
    model = add_prediction_layer(Path(shutil.copytree(ROOT / "examples/tiny_fim/model", tmp_path / "model")))
    run = start("run", f"model.hf_path={model}", "--rollout-engine", "sglang")
    run.until_trained(2)
    assert f"{model}: 1 layers for multi-token prediction are left out" in run.console
    assert "weight sync: the direct path, " in run.console
    tree = run.tree()
    run.torchrun.send_signal(signal.SIGINT)
    run.torchrun.wait(25)
    run.assert_all_gone(tree, 15)
