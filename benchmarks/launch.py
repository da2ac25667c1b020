"""How the benchmarks that compare whole runs start one, end with it, and write what they have found."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_sglang import signals  # noqa: E402

TIMEOUT_S = 400
KILL_AFTER_S = 40
"""Later than torchrun, which kills ranks that have not ended 30 s after it has told them to."""
POLL_S = 0.2
_came: list[int] = []
"""The signal that ends this process: from then on no run starts, and what runs is ended by who waits for it."""
_under_way: list[Sequence[str]] = []
"""Commands that `launch` waits for, in all threads."""


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """A command for `launch`."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return [sys.executable, "-m", *launcher, *arguments]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP end what `launch` has started, in any thread, and then this process, with
    status 128 + signal and through everything that is to be closed. In the main thread only."""

    def end(number: int, _frame: Any) -> None:
        if _came:  # it is being ended
            return
        _came.append(number)
        if not _under_way:  # else `launch` raises it, when its command has ended
            raise SystemExit(128 + number)

    with signals.handled(end, *signals.not_ignored(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield


def launch(
    command: Sequence[str],
    *,
    timeout_s: int = TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    log: IO[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `command` in `ROOT`, inside `interruptible`; its status is 124 if it was ended after timeout_s.

    It is ended by SIGTERM, which torchrun hands to the ranks, and they to what they have started; after timeout_s also
    if this process has been killed. env: `environment()` unless given. log: takes its output, else the console does.

    Raises:
        SystemExit: a signal has come to this process, and the command has ended for it.
    """
    # The signal comes to it from here alone, and once: a second one would cut off torchrun's waiting for its ranks. So
    # it is not among the processes that the terminal's Ctrl-C reaches, and `timeout` signals it, not its whole group.
    ended = ("timeout", "--foreground", f"--kill-after={KILL_AFTER_S}", str(timeout_s), *command)
    _under_way.append(ended)
    try:
        _end_if_told()
        env = environment() if env is None else env
        status = _wait_for(subprocess.Popen(ended, cwd=ROOT, env=env, stdout=log, stderr=log, process_group=0))
    finally:
        _under_way.remove(ended)
    _end_if_told()
    return subprocess.CompletedProcess(command, status)


def _end_if_told() -> None:
    if _came:
        raise SystemExit(128 + _came[0])


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Its status when it has ended, by itself or since we are told to end."""
    try:
        while process.poll() is None and not _came:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    finally:
        process.terminate()
        process.wait()
    return process.returncode


def environment() -> dict[str, str]:
    """This one, where nothing need be installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}


def random_model(layers: int, folder: Path) -> tuple[str, str]:
    """Arguments for Qwen3-30B-A3B's shape with fewer layers and random weights; made in `folder`, with the tokenizer of
    examples/tiny_fim."""
    config = json.loads((ROOT / "examples/qwen3_30b_a3b/config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tiny_fim/model" / name, folder)
    return f"model.hf_path={folder}", "model.random_weights=true"


def write(script: str, found: Mapping[str, Any], output: Path | None) -> None:
    """Print it as JSON with the command that made it, and to `output` where that is given."""
    command = f"benchmarks/{script} " + " ".join(sys.argv[1:]).partition("--output")[0]
    text = json.dumps({"command": command, **found}, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")
