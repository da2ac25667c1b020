"""One model under training: its folder, its processes, the step from rows to new weights.

BASE_PATH/PROJECT/NAME/
  config.yaml             what the run was started with
  logs/sglang.log         the engine           logs/trainer.log, rank<N>.log   the trainer
  logs/endpoint.log       the endpoint         logs/keeper.log                 what keeps them all
  run/                    the run's records (metrics.jsonl, trace, engine.json, feed.sock)
  checkpoints/            Megatron's, the newest only
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import megatron_sglang
from megatron_sglang import config_load
from megatron_sglang.art.endpoint import Endpoint
from megatron_sglang.art.feeding import Feeding
from megatron_sglang.art.options import Devices
from megatron_sglang.art.tree import Tree
from megatron_sglang.errors import ConfigError, DataError, MegatronSglangError
from megatron_sglang.feed.batch import Wanted
from megatron_sglang.feed.door import NAME as FEED
from megatron_sglang.trace import METRICS, read_lines

TRAINER = "training run"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


def folder_of(base_path: str | Path, project: str, name: str) -> Path:
    """The folder of a model. `ConfigError` for names that would lead out of `base_path`."""
    for what, given in (("project", project), ("name", name)):
        if not _NAME.fullmatch(given):
            raise ConfigError(f"{what}={given!r} is no name for a folder; use letters, digits, '_', '-' and '.'")
    return Path(base_path).expanduser().resolve() / project / name


@dataclass(frozen=True, slots=True)
class Step:
    """What one batch did."""

    batch: int
    version: int
    record: Mapping[str, float]


class Live:
    """The processes that train one model and serve it. For one event loop: `start`, then `step` after `step`, then
    `close`, whatever happened. timeout_s: for the start, and for each train step. port: the endpoint's; 0: a free
    one."""

    def __init__(
        self, folder: Path, devices: Devices, environment: Mapping[str, str], *, timeout_s: float, port: int
    ) -> None:
        self.folder, self.devices, self.timeout_s = folder, devices, timeout_s
        self._port = port
        self.run_dir = folder / "run"
        self.logs = folder / "logs"
        self.endpoint: Endpoint | None = None
        self._environment = _with_package(environment)
        self._lock = -1
        self._tree: Tree | None = None
        self._feeding: Feeding | None = None

    @property
    def pid(self) -> int | None:
        """Pid of the keeper, under which all other processes of this model are."""
        return self._tree.pid if self._tree is not None else None

    async def start(self, config: Mapping[str, Any]) -> None:
        """Start everything; returns when the first weights are served. Closes what was started if that fails.

        Raises `ConfigError` for a configuration that cannot work or a folder in use, the run's own error if it ends.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / ".lock")
        try:
            await self._start(config)
        except BaseException:
            await self.close()
            raise

    async def _start(self, config: Mapping[str, Any]) -> None:
        """Keeper, then trainer and endpoint side by side, then the feed; see `start`."""
        written = self.folder / "config.yaml"
        written.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        # Here, and not only in the run, so that a mistake is said at once.
        config_load.split_argv(["--config", str(written)], local_world_size=self.devices.ranks)
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / FEED).unlink(missing_ok=True)  # of a run that was killed
        for ours, theirs in (("sglang.log", "engine.log"), *((f"rank{n}.log",) * 2 for n in range(self.devices.ranks))):
            _link(self.logs / ours, Path("..", "run", theirs))
        self._tree = Tree([self._lock])
        await self._tree.start(self.logs / "keeper.log")
        ranks = ["--standalone", f"--nproc-per-node={self.devices.ranks}"]
        trainer = ["-m", "megatron_sglang.art.trainer", "--config", str(written)]
        await self._tree.launch(
            TRAINER,
            [sys.executable, "-m", "torch.distributed.run", *ranks, *trainer],
            log=self.logs / "trainer.log",
            environment=self._environment,
            remove=[self.run_dir / FEED, self.run_dir / "engine.json"],
        )
        self.endpoint = Endpoint(self._tree, self.run_dir, self.logs / "endpoint.log", self.folder.name, self._port)
        await self.endpoint.launch(self._environment)
        self._feeding = await self._tree.alive(
            TRAINER, Feeding.open(self.run_dir / FEED), self.timeout_s, "the start of the training run"
        )
        await self.wanted()
        await self.endpoint.ready()

    async def wanted(self) -> Wanted:
        """The batch that the run waits for, once the weights before it are served."""
        tree, feeding = self._running()
        return await tree.alive(TRAINER, feeding.wanted(), self.timeout_s, "publishing the weights")

    async def step(self, groups: list[list[dict[str, Any]]], learning_rate: float | None) -> Step:
        """Train on a batch; returns when the new weights are served.

        `DataError` with the run's reason for a batch it refuses, which changes nothing; the run's own error if it ends.
        """
        tree, feeding = self._running()
        wanted = await self.wanted()
        await tree.alive(TRAINER, feeding.give(groups, learning_rate), self.timeout_s, "taking the batch")
        after = await tree.alive(TRAINER, feeding.wanted(), self.timeout_s, "the train step")
        lines = read_lines(self.run_dir / METRICS)
        record = next((line for line in reversed(lines) if line["iteration"] == wanted.batch), None)
        if record is None:
            raise DataError(f"{self.run_dir / METRICS} has no record of batch {wanted.batch}")
        return Step(wanted.batch, after.version, {k: v for k, v in record.items() if k not in ("iteration", "time")})

    async def close(self) -> None:
        """End every process; returns when nothing runs any more. Idempotent."""
        if self._feeding is not None:
            await self._feeding.close()
        if self._tree is not None:
            await self._tree.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._feeding, self._tree, self._lock, self.endpoint = None, None, -1, None

    def _running(self) -> tuple[Tree, Feeding]:
        if self._tree is None or self._feeding is None:
            raise MegatronSglangError(f"{self.folder} is not under training; register the model first")
        return self._tree, self._feeding


def _locked(path: Path) -> int:
    """A descriptor with an exclusive lock. The run's processes inherit it, so that the folder counts as in use until
    the last of them has ended."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"{path.parent} is in use by another backend, or by one that has not ended yet; close it, or give the "
            "model another name"
        ) from None
    return lock


def _link(link: Path, target: Path) -> None:
    with contextlib.suppress(FileExistsError):
        link.symlink_to(target)


def _with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this package on Python's path, and without the working folder, whose files might shadow
    it."""
    root = str(Path(megatron_sglang.__file__).parents[1])
    path: Sequence[str] = [root, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
