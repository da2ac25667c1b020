"""Judging untrusted programs: many small jobs, each in fresh processes of a sandbox chosen by what this machine allows.

A job's solution and its tests run in two processes, in two boxes (`box/`), joined by a socket that carries literals
only. `workers` pairs of boxes work in parallel; a box starts once and forks per job. docs/sandbox.md says what each
tier guarantees. Nothing a solution does raises here: it fails its own job.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self, get_args

from megatron_sglang.errors import ConfigError, SandboxError
from megatron_sglang.rewards.box.literals import ChannelError, TooLarge, pack, receive
from megatron_sglang.rewards.boxes import Box, BoxDied, Tier
from megatron_sglang.text import encodable

Test = str | Mapping[str, Any]
JUDGE_GRACE_S = 1.0  # the tests outlive the solution, to tell how it ended
STRONG: tuple[Tier, ...] = ("bubblewrap", "namespaces")
ATTEMPTS = 3
OUT_OF_TIME = ("killed", "SIGXCPU")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may use; its two processes are held to it separately."""

    cpu_s: int = 2
    wall_s: float = 6.0
    """More than `cpu_s`, so that a busy machine does not change verdicts."""
    memory_mb: int = 512
    """Address space; an idle interpreter takes about 40 MB."""
    processes: int = 16
    tmp_mb: int = 16
    message_bytes: int = 1 << 20
    """Of one returned value, encoded. What is printed goes nowhere."""


@dataclass(frozen=True, slots=True)
class Job:
    """A program and its tests: each a string of statements about `candidate`, or {"args": [...], "expect": value}.

    >>> Job("def f(a):\\n    return a + 1\\n", "f", ({"args": [1], "expect": 2}, "assert candidate(2) == 3"))
    """

    source: str
    entry_point: str
    tests: Sequence[Test]
    preamble: str = ""
    """Trusted statements for the tests' process."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which tests passed, and why the first that failed did. `broken`: the tests themselves cannot run. `late`: some
    were not answered in time, maybe not the first that failed."""

    passed: tuple[bool, ...]
    detail: str = ""
    broken: str = ""
    late: bool = False


class Sandbox:
    """A pool of boxes of one tier.

    `all_pure` promises programs of the restricted sublanguage only. `unsafe` allows the tier "unsafe-local".
    `use_filter=False` leaves out the system call filter (tests of the other walls do).
    Raises `SandboxError` if no allowed tier works here.
    """

    def __init__(
        self,
        tier: Tier | Literal["auto"] = "auto",
        *,
        limits: Limits | None = None,
        workers: int = 2,
        unsafe: bool = False,
        all_pure: bool = False,
        use_filter: bool = True,
    ) -> None:
        if tier not in ("auto", *get_args(Tier)):
            raise ConfigError(f"sandbox tier {tier!r} is unknown; choose auto, {', '.join(get_args(Tier))}")
        if workers < 1:
            raise ConfigError(f"sandbox workers={workers}; expected at least 1")
        self.limits = limits or Limits()
        self.refused: dict[str, str] = {}
        """Tiers tried and found not to work, with the reason."""
        self._workers, self._use_filter = workers, use_filter
        self._boxes: list[Box] = []
        self._threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="sandbox")
        try:
            self.tier: Tier = self._choose(tier, unsafe=unsafe, all_pure=all_pure)
        except BaseException:
            self.close()
            raise

    @property
    def filtered(self) -> bool:
        """Whether the system calls of solutions are filtered."""
        return self._boxes[0].filtered

    @property
    def description(self) -> str:
        """For the log: tier, filter, workers, limits."""
        filter_ = "system calls filtered" if self.filtered else "system calls not filtered"
        each = f"{self.limits.cpu_s} s and {self.limits.memory_mb} MB a job"
        return f"{self.tier} ({filter_}, {self._workers} workers, {each})"

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Judge all jobs, in parallel; verdicts in the order of the jobs. Nothing that a job started is left then."""
        verdicts = list(self._threads.map(self._judge, jobs))
        for box in self._boxes:
            with contextlib.suppress(BoxDied):
                box.settle()
        return verdicts

    def close(self) -> None:
        """End all boxes. Idempotent."""
        self._threads.shutdown(cancel_futures=True)
        self._close_boxes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _choose(self, wanted: Tier | Literal["auto"], *, unsafe: bool, all_pure: bool) -> Tier:
        if wanted == "unsafe-local" and not unsafe:
            raise SandboxError("sandbox tier 'unsafe-local' isolates nothing; it needs --unsafe-local-sandbox as well")
        candidates = (wanted,) if wanted != "auto" else _candidates(unsafe=unsafe, all_pure=all_pure)
        for tier in candidates:
            try:
                self._open(tier)
            except SandboxError as error:
                self.refused[tier] = str(error)
            else:
                return tier
        raise SandboxError(
            f"no sandbox for untrusted code: {'; '.join(self.refused.values())}. Install bubblewrap, allow "
            "unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0; docker run --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined), use only problems with pure=true, or accept the risk with "
            "--unsafe-local-sandbox"
        )

    def _open(self, tier: Tier) -> None:
        """Start all boxes of a tier and prove on a real job that they isolate."""
        self.tier = tier
        grace = replace(self.limits, wall_s=self.limits.wall_s + JUDGE_GRACE_S, cpu_s=2 * self.limits.cpu_s)
        self._pairs: queue.SimpleQueue[tuple[Box, Box]] = queue.SimpleQueue()
        for _ in range(self._workers):
            pair = tuple(Box(tier, asdict(limits), use_filter=self._use_filter) for limits in (self.limits, grace))
            self._boxes += pair
            self._pairs.put((pair[0], pair[1]))
        try:
            list(self._threads.map(Box.start, self._boxes))
            verdict = self._judge(_probe(tier))
            if verdict.passed != (True,):
                raise SandboxError(f"sandbox tier {tier!r} does not isolate here: {verdict.detail}{verdict.broken}")
        except SandboxError:
            self._close_boxes()
            raise

    def _close_boxes(self) -> None:
        while self._boxes:
            self._boxes.pop().close()

    def _judge(self, job: Job) -> Verdict:
        pair = self._pairs.get()
        try:
            for _ in range(ATTEMPTS):
                with contextlib.suppress(BoxDied):  # an earlier job had damaged it; now a new one is started
                    return self._judge_in(job, *pair)
            raise SandboxError(
                f"sandbox tier {self.tier!r} works no more: {ATTEMPTS} boxes died before they took a job"
            )
        finally:
            self._pairs.put(pair)

    def _judge_in(self, job: Job, solver: Box, judge: Box) -> Verdict:
        calls, answers = socket.socketpair()
        verdicts, results = socket.socketpair()
        with verdicts:
            try:
                with calls, answers, results:
                    solver.submit(_solution(job, self.tier), [calls])
                    judge.submit(_tests(job), [answers, results])
                return self._collect(job, verdicts, solver, judge)
            except TooLarge as error:
                return Verdict((False,) * len(job.tests), broken=str(error))
            finally:
                solver.stop()
                judge.stop()

    def _collect(self, job: Job, verdicts: socket.socket, solver: Box, judge: Box) -> Verdict:
        passed, details, late = [], [], False
        verdicts.settimeout(self.limits.wall_s + 2 * JUDGE_GRACE_S)
        for _ in job.tests:
            try:
                message = receive(verdicts, self.limits.message_bytes)
            except ChannelError as error:
                details.append(f"the tests did not end: {error}")
                late = True
                judge.close()
                break
            if "broken" in message:
                return Verdict((False,) * len(job.tests), broken=encodable(message["broken"]))
            if message["gone"]:
                status = solver.settle()
                late = status in OUT_OF_TIME
                details.append("timeout" if late else f"{message['detail']} ({status})")
                break
            passed.append(message["ok"])
            details += [message["detail"]] if message["detail"] else []
        passed += [False] * (len(job.tests) - len(passed))
        return Verdict(tuple(passed), encodable(next(iter(details), "")), late=late)


def _solution(job: Job, tier: Tier) -> dict[str, Any]:
    restricted = tier == "restricted"
    return {"task": "solve", "source": job.source, "entry_point": job.entry_point, "restricted": restricted}


def _tests(job: Job) -> dict[str, Any]:
    tests = [
        test if isinstance(test, str) else {"args": pack(list(test["args"])), "expect": pack(test["expect"])}
        for test in job.tests
    ]
    task = "judge" if job.preamble or any(isinstance(test, str) for test in tests) else "compare"
    return {"task": task, "tests": tests, "entry_point": job.entry_point, "preamble": job.preamble}


def _probe(tier: Tier) -> Job:
    """Passes only where the tier keeps its promise: a strong one hides our files and all other processes."""
    if tier not in STRONG:
        return Job("def probe(a):\n    return a + 1\n", "probe", ({"args": [1], "expect": 2},))
    source = "import os\ndef probe(path):\n    return os.path.exists(path), os.getppid()\n"
    return Job(source, "probe", ({"args": [__file__], "expect": (False, 1)},))


def _candidates(*, unsafe: bool, all_pure: bool) -> tuple[Tier, ...]:
    # Root becomes nobody in our own namespaces but stays root's user in bubblewrap's.
    strong: tuple[Tier, ...] = STRONG if os.geteuid() else STRONG[::-1]
    return (*strong, *(("restricted",) if all_pure else ()), *(("unsafe-local",) if unsafe else ()))
