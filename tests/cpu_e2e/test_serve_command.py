"""`megatron-sglang serve` as a process: what it prints, whom it lets in, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serve_tools import (
    EXAMPLE,
    KEY,
    error_of,
    with_template,
)

pytestmark = pytest.mark.timeout(200)


@contextlib.contextmanager
def command(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """`megatron-sglang serve`, and its next line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sglang.cli", "serve", *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    """An engine that outlives its endpoint, a key on the screen, or a second process on the port."""
    model = with_template(EXAMPLE, tmp_path / "tiny")
    with command("--model", str(model), "--kind", "fake", "--port", "0") as (process, line):
        said = line()
        assert "http://127.0.0.1:" in said, process.communicate(timeout=5)
        url, key_path = said.split(" at ")[1].split(",")[0], Path(said.split(" in ")[1].strip())
        assert key_path.stat().st_mode & 0o777 == 0o600
        authorization = f"Authorization: Bearer {key_path.read_text().strip()}"
        asked = subprocess.run(
            ["curl", "-sS", "-H", authorization, "-d", '{"prompt": "a", "max_tokens": 2}', url + "/completions"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert json.loads(asked.stdout)["usage"]["completion_tokens"] == 2, asked
        stuck = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143, process.communicate()
        stuck.close()
        assert not key_path.exists()


def test_two_endpoints_of_one_run_have_a_key_each(tmp_path: Path) -> None:
    """The second one's end must not take the first one's key along."""

    def ask(said: str) -> int:
        url, key_path = said.split(" at ")[1].split(",")[0], Path(said.split(" in ")[1].strip())
        headers = {"Authorization": f"Bearer {key_path.read_text().strip()}"}
        return httpx.get(f"{url}/models", headers=headers, trust_env=False, timeout=30).status_code

    words = "--run", str(tmp_path), "--port", "0"
    with command(*words) as (_, first_line):
        first = first_line()
        with command(*words) as (process, line):
            assert ask(line()) == ask(first) == 503, "the keys are right, there is no engine"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
        assert ask(first) == 503


def test_the_command_needs_a_key_of_yours_for_other_machines(tmp_path: Path) -> None:
    """An endpoint on all interfaces that anyone can use."""
    key = tmp_path / "key"
    key.write_text("k" * 40)
    for words, expected in (
        (["--host", "0.0.0.0"], "no key was set"),
        (["--host", "0.0.0.0", "--api-key-file", str(key)], "can be read by others"),
        (["--sglang-host", "0.0.0.0"], "always listens on 127.0.0.1"),
        (["--max-tokens", "0"], "must be more than 0"),
        (["--kind", "fake", "--model", str(tmp_path / "absent")], "absent cannot be served"),
    ):
        key.chmod(0o644)
        with command("--model", str(EXAMPLE), "--port", "0", *words) as (process, _):
            _, errors = process.communicate(timeout=60)
            assert (process.returncode, expected in errors) == (1, True), errors
            assert "Traceback" not in errors


def test_the_command_waits_for_a_run(tmp_path: Path) -> None:
    """Started before its run, or left over from one, it answers that there is none."""
    with command("--run", str(tmp_path), "--port", "0", MEGATRON_SGLANG_API_KEY=KEY) as (process, line):
        said = line()
        assert "API key as you set it" in said
        url = said.split(" at ")[1].split(",")[0]
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.post(f"{url}/completions", json={"prompt": "a"}, headers=headers, trust_env=False, timeout=30)
        assert found.status_code == 503
        assert "no engine is announced" in error_of(found)["message"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_it_unless_nohup_was_asked_for(tmp_path: Path, ignored: bool) -> None:
    """nohup starts it with SIGHUP ignored; it ended all the same, with the session in which it was started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with contextlib.ExitStack() as running:
        try:
            words = "--run", str(tmp_path), "--port", "0"
            process, line = running.enter_context(command(*words, MEGATRON_SGLANG_API_KEY=KEY))
        finally:
            signal.signal(signal.SIGHUP, before)
        health = line().split(" at ")[1].split("/v1,")[0] + "/health"
        process.send_signal(signal.SIGHUP)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            assert httpx.get(health, trust_env=False, timeout=30).status_code == 503
        else:
            assert (process.wait(20), process.communicate()[1]) == (128 + signal.SIGHUP, "")
