"""The engine's supervisor (`engine/launch.py`), run as a process with a server of the test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SERVER = """
import multiprocessing
from pathlib import Path

def look(answer):
    try:
        import megatron.core
    except ImportError as error:
        Path(answer).write_text(type(error).__name__)
    else:
        Path(answer).write_text("there")

def serve(spec, listener):
    look(spec["folder"] + "/server")
    rank = multiprocessing.get_context("spawn").Process(target=look, args=(spec["folder"] + "/rank",))
    rank.start()
    rank.join()
"""


def test_megatron_is_hidden_from_an_engine(tmp_path: Path) -> None:
    (tmp_path / "server_of_the_test.py").write_text(SERVER)
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    spec = {"module": "server_of_the_test", "folder": str(tmp_path)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with socket.socket() as listener, subprocess.Popen(
        [sys.executable, "-P", "-m", "megatron_sglang.engine.launch", str(listener.fileno())],
        stdin=subprocess.PIPE, env=environment, pass_fds=[listener.fileno()], text=True,
    ) as supervisor:  # fmt: skip
        assert supervisor.stdin is not None
        supervisor.stdin.write(json.dumps(spec) + "\n")
        supervisor.stdin.flush()
        assert supervisor.wait(60) == 1  # "died": the server ended by itself
    found = {name: (tmp_path / name).read_text() for name in ("server", "rank")}
    assert found == {"server": "ModuleNotFoundError", "rank": "ModuleNotFoundError"}
