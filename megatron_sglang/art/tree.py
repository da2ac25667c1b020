"""A backend's processes, seen from the backend: started, watched and ended through `keeper.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_sglang.art.keeper import GRACE_S
from megatron_sglang.errors import EngineDiedError, EngineTimeoutError, MegatronSglangError, SetupError, from_text
from megatron_sglang.text import last_lines

_SAID = re.compile(r"^rank \d+: (\w+): (.*)$", re.MULTILINE)


@dataclass(slots=True)
class Child:
    """One process that the keeper has started."""

    log: Path
    start: int
    """Bytes that the log had before it."""
    ended: asyncio.Event
    code: int | None = None
    process: psutil.Process | None = None
    """None where it ended before it could be looked at."""

    def text(self) -> str:
        """What it has written."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace")

    def why(self, name: str) -> MegatronSglangError:
        """The error to raise for its end: the one that a rank of it has reported, or else the last lines of its log."""
        text = self.text()
        said = _SAID.search(text)
        if said:
            return from_text(said[1], f"{said[2]}; log: {self.log}")
        return MegatronSglangError(
            f"the {name} ended with code {self.code}; last lines of {self.log}:\n{last_lines(text)}"
        )


class Tree:
    """A backend's processes, under one keeper. For one event loop. held: file descriptors (locks) that keeper and
    children inherit, so that they stay open as long as any of them runs."""

    def __init__(self, held: Sequence[int] = ()) -> None:
        self.children: dict[str, Child] = {}
        self._held = held
        self._keeper: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self, log: Path) -> None:
        """Start the keeper."""
        with log.open("ab") as output:
            # By its path: as a module it would import the packages it stands in.
            self._keeper = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                str(Path(__file__).with_name("keeper.py")),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                pass_fds=self._held,
            )
        self._listening = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int | None:
        """Pid of the keeper; None before `start` and after `close`."""
        return self._keeper.pid if self._keeper is not None else None

    async def launch(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        remove: Sequence[Path] = (),
    ) -> None:
        """Start a child; its output is appended to `log`. remove: what must not outlive it, even if it is killed."""
        assert self._keeper is not None, "start comes first"
        assert self._keeper.stdin is not None
        before = log.stat().st_size if log.exists() else 0
        self.children[name] = Child(log, before, asyncio.Event())
        command = {
            "start": name,
            "argv": list(argv),
            "environment": dict(environment),
            "cwd": os.getcwd(),
            "log": str(log),
            "remove": [str(path) for path in remove],
            "held": list(self._held),
        }
        self._keeper.stdin.write(json.dumps(command).encode() + b"\n")
        try:
            await self._keeper.stdin.drain()
        except ConnectionError as error:
            raise SetupError(f"the keeper of the backend's processes ended; see {log.parent}") from error

    async def alive[T](self, name: str, work: Awaitable[T], timeout_s: float, what: str) -> T:
        """What `work` gives; the error of child `name` where that ends first. `what` names it when time is up."""
        child = self.children[name]
        wanted = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(child.ended.wait())
        try:
            await asyncio.wait({wanted, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done() and isinstance(wanted.exception(), EngineDiedError):
                # A broken connection is seen a moment before the end of the process that broke it.
                await asyncio.wait({ended}, timeout=GRACE_S)
            elif wanted.done():
                return wanted.result()
            if ended.done():
                raise child.why(name)
            if wanted.done():
                return wanted.result()
        finally:
            for task in (wanted, ended):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        raise EngineTimeoutError(f"{what} was not done within {timeout_s:g} s; see {child.log}")

    async def close(self) -> None:
        """Returns when nothing of the tree runs any more. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            async with asyncio.timeout(2 * GRACE_S):
                await keeper.wait()
        except TimeoutError:
            keeper.kill()
            await keeper.wait()
        if self._listening is not None:
            await self._listening
        # Where the keeper was killed, the kernel has told its children to end, and nobody waits for them.
        left = [child.process for child in self.children.values() if child.process is not None]
        _, alive = await asyncio.to_thread(psutil.wait_procs, left, GRACE_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async def _listen(self) -> None:
        """Note the children's processes and ends that the keeper reports; when it is gone itself, all will end."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        async for line in self._keeper.stdout:
            event = json.loads(line)
            if "started" in event:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.children[event["started"]].process = psutil.Process(event["pid"])
            if "ended" in event:
                self._ended(event["ended"], event["code"])
        for name, child in self.children.items():  # the keeper is gone, and with it its children
            if not child.ended.is_set():
                self._ended(name, None)

    def _ended(self, name: str, code: int | None) -> None:
        self.children[name].code = code
        self.children[name].ended.set()
