"""ART's surface on the real stack: register, sample, train, close; and the kill of the process that holds a backend."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_sglang.art import SGLangBackend, SGLangConfig, TrainableModel, TrainConfig, Trajectory, TrajectoryGroup
from megatron_sglang.errors import ConfigError, DataError, SetupError

ROOT = Path(__file__).parents[2]
PROMPT = [1, 70, 71, 72, 2, 73, 3]
"""FIM tokens and letters; which ones does not matter."""
OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"max_prompt_tokens": 16},
    "rollout": {"prompts_per_batch": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
    "megatron": {"micro-batch-size": 4, "weight-decay": 0},
}
PATIENCE = SGLangConfig(server_timeout=300.0, health_check_interval=1.0)
THEIRS = ("torchelastic_", "torchinductor_")
"""Beginnings of what torchrun and torch leave in the temporary folder."""


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both tests have the model."""
    return tmp_path_factory.mktemp("art") / ".art"


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for temporary files of everything that a test starts."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


def nothing_left(processes: list[psutil.Process], run_dir: Path, temp: Path, within_s: float) -> None:
    """No process, no socket, no announcement, no key, no temporary file."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert not alive, [(one.pid, one.cmdline()) for one in alive]
    names = {path.name for path in run_dir.iterdir()}
    assert not names & {"feed.sock", "engine.json", "serve.key"}
    assert [path.name for path in temp.iterdir() if not path.name.startswith(THEIRS)] == []


def tree_of(pid: int | None) -> list[psutil.Process]:
    assert pid is not None
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


async def sample(client: Any, model: TrainableModel) -> list[TrajectoryGroup]:
    """Two groups of two: one begins with the most likely token and gets 0, one does not and gets 1.

    Any two would do for the surface. These two differ in their first token, so a step moves that token's logprob,
    and by more than chance: two rows that are the same, or two groups that pull against each other, would not.
    """
    likely, _, _ = await greedy(client)
    rows: dict[bool, list[Any]] = {True: [], False: []}
    async with asyncio.timeout(60):
        while min(len(found) for found in rows.values()) < 2:
            answer = await client.completions.create(
                model=model.get_inference_name(), prompt=PROMPT, n=4, max_tokens=4, temperature=1.0
            )
            for choice in answer.choices:
                rows[choice.token_ids[0] == likely].append(choice)
    return [
        TrajectoryGroup(
            Trajectory([{"role": "user", "content": "a hole"}, choice], reward=reward)
            for choice, reward in ((rows[True][group], 0.0), (rows[False][group], 1.0))
        )
        for group in range(2)
    ]


async def greedy(client: Any) -> tuple[int, float, int]:
    """Most likely next token, its logprob, and the weight version, all as the endpoint says."""
    answer = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, temperature=0.0)
    [choice] = answer.choices
    return choice.token_ids[0], choice.logprobs.token_logprobs[0], answer.weight_version


async def trains(model: TrainableModel, temp: Path) -> None:
    folder = Path(model.base_path, model.project, model.name)
    backend = SGLangBackend(sglang_config=PATIENCE, options=OPTIONS, train_timeout=400.0)
    with pytest.raises(SetupError, match="not registered"):
        await backend.train(model, [])
    async with backend:
        await backend.register(model)
        processes = tree_of(backend._live.pid if backend._live else None)
        commands = [" ".join(one.cmdline()) for one in processes]
        assert model.inference_base_url is not None
        assert model.inference_api_key is not None
        assert not any(model.inference_api_key in command for command in commands)
        with pytest.raises(ConfigError, match="this backend trains 'tiny'"):
            await backend.register(TrainableModel("other", "p", model.base_model))
        with pytest.raises(ConfigError, match="in use"):
            await SGLangBackend(options=OPTIONS).register(model)

        async with model.openai_client() as client:
            assert (await backend.get_step(model), (await greedy(client))[2]) == (0, 1)
            first = await sample(client, model)
            with pytest.raises(DataError, match="1 groups of 2 rows; this run takes 2 groups of 2 rows"):
                await backend.train(model, first[:1])
            before = await greedy(client)
            result = await backend.train(model, first, TrainConfig(learning_rate=1e-2))
            after = await greedy(client)
            assert (result.step, result.weight_version, after[2]) == (1, 2, 2)
            assert after[0] != before[0] or after[1] < before[1] - 1e-2, "the likely token had no reward"
            assert result.metrics["rollout/reward"] == 0.5
            assert result.metrics["train/logprob_gap_max"] < 1e-3, "what was trained on is what was sampled"
            with pytest.raises(DataError, match="sampled with weight version 1; the run is at version 2"):
                await backend.train(model, first)
            second = await sample(client, model)
            result = await backend.train(model, [*second, *await sample(client, model)], learning_rate=0.0)
            same = await greedy(client)
            assert (result.step, same[2]) == (2, 3)
            assert same[:1] == after[:1]
            assert abs(same[1] - after[1]) < 1e-4, "a learning rate of 0 changes nothing, in two train steps"
        address = model.inference_base_url
        processes = tree_of(backend._live.pid if backend._live else None)
    nothing_left(processes, folder / "run", temp, within_s=0.0)
    assert model.inference_base_url is None
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, trust_env=False)
    assert (folder / "logs" / "sglang.log").read_text()
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert len(list((folder / "checkpoints").glob("iter_*"))) == 1


@pytest.mark.timeout(600)
def test_a_model_is_trained_through_the_surface(art: Path, temp: Path, tiny_model: Path) -> None:
    model = TrainableModel("tiny", "p", str(tiny_model), base_path=str(art))
    asyncio.run(trains(model, temp))


HOLDER = """
import asyncio, json, sys
from megatron_sglang.art import SGLangBackend, TrainableModel

async def hold():
    options = json.loads(sys.argv[3])
    options["rollout"]["engine"] = "fake"
    backend = SGLangBackend(options=options)
    model = TrainableModel("tiny", "p", sys.argv[1], base_path=sys.argv[2])
    await backend.register(model)
    print(await backend.get_step(model), flush=True)
    await asyncio.sleep(600)

asyncio.run(hold())
"""


@pytest.mark.timeout(400)
def test_another_process_goes_on_and_leaves_nothing_when_it_is_killed(art: Path, temp: Path, tiny_model: Path) -> None:
    """It finds the two steps of the test above, and then gets SIGKILL, with engine, rank and endpoint up."""
    run_dir = art / "p" / "tiny" / "run"
    argv = [sys.executable, "-c", HOLDER, str(tiny_model), str(art), json.dumps(OPTIONS)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "2\n"
            processes = tree_of(holder.pid)[1:]
            commands = "\n".join(" ".join(one.cmdline()) for one in processes)
            assert all(part in commands for part in ("keeper.py", "art.trainer", "engine.launch", "serve"))
        finally:
            holder.send_signal(signal.SIGKILL)
    try:
        nothing_left(processes, run_dir, temp, within_s=90)
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_example_runs(tmp_path: Path, temp: Path) -> None:
    """What docs/art.md shows, in fewer steps and problems."""
    arguments = ["--steps", "2", "--held-out", "16", "--base-path", str(tmp_path / ".art")]
    command = [sys.executable, "examples/art_tiny.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 2: reward 0." in done.stdout, done.stdout
    assert ", 16 problems, " in done.stdout
    assert [path.name for path in temp.iterdir() if not path.name.startswith(THEIRS)] == []
