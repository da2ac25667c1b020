"""What a run leaves in its folder, written as it happens so that a crash loses at most the line being written.

    config.yaml       the resolved configuration
    metrics.jsonl     one line per iteration: {"iteration": 3, "time": <unix seconds>, "train/loss": ...}
    rollouts.jsonl    one line per completion
    trace.<n>.json    spans of the n-th start in Chrome's trace format; open in ui.perfetto.dev
    tensorboard/      events, if that tracker is on

Iteration k is one rollout batch: evaluation and rollout of the policy after k batches, then training on it. One more
line at the end (k = number of batches) holds the last evaluation.

Numbers that are not finite are written as "nan", "inf" or "-inf", which keeps the lines JSON. A resumed run continues
the files after dropping what it will do again; a new run in a used folder first renames the old files to *.<n>.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import IO, Any, Self

from omegaconf import OmegaConf

from megatron_sglang.errors import DataError
from megatron_sglang.text import HALF_PAIRS
from megatron_sglang.trackers import create_tracker
from megatron_sglang.types import Prompt, RolloutGroup

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"


class RunLog:
    """The records of one run, on the rank that leads it; one thread only.

    >>> with RunLog(folder, total=60, config=asdict(run_config)) as log:
    ...     for iteration in range(60):
    ...         with log.span("rollout"), log.span("generate"):
    ...             ...
    ...         log.rollouts(iteration, groups)
    ...         log.step(iteration, values(metrics))
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        total: int | None = None,
        config: Mapping[str, Any] | None = None,
        trackers: Sequence[str] = (),
        resume_after: int | None = None,
        echo: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        """`total`: iterations of the run, for the ETA. `resume_after`: last iteration to keep; None: a new run.

        Raises `SetupError` for a tracker whose package is missing, `ConfigError` for one that does not exist,
        `DataError` for records that cannot be continued.
        """
        self.folder = Path(folder)
        self._total, self._echo = total, echo
        self._open_spans: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._recent: list[float] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            OmegaConf.save(OmegaConf.create(dict(config)), self.folder / "config.yaml")
        self._metrics, self._rollouts = (self._open(name, resume_after) for name in (METRICS, ROLLOUTS))
        self._trace = _free_path(self.folder / "trace.json", before_suffix=True).open("w", encoding="utf-8")
        first = 0 if resume_after is None else resume_after + 1
        self._trackers = {name: create_tracker(name, self.folder, config or {}, first) for name in trackers}
        self._silent: set[str] = set()
        """Trackers that have failed, and were told of."""
        self._origin = self._last_step = time.perf_counter()
        start = {"name": "start", "ph": "i", "ts": 0, "pid": os.getpid(), "tid": 0, "args": {"unix_s": time.time()}}
        self._trace.write("[\n" + json.dumps(start))

    def say(self, line: str) -> None:
        """Print a line between the progress lines."""
        self._echo(line)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure a phase; nested ones are named outer/inner. Its seconds go into the next `step` as timing_s/<name>,
        also when it ends by an error."""
        self._open_spans.append(name)
        path = "/".join(self._open_spans)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._open_spans.pop()
            self._seconds[path] += seconds
            times = {"ts": round((start - self._origin) * 1e6), "dur": round(seconds * 1e6)}
            event = {"name": name, "cat": path, "ph": "X", **times, "pid": os.getpid(), "tid": 0}
            self._trace.write(",\n" + json.dumps(event))

    def rollouts(
        self,
        iteration: int,
        groups: Sequence[RolloutGroup],
        *,
        kind: str = "train",
        prompt_text: Callable[[Prompt], str] | None = None,
        logprobs: bool = False,
    ) -> None:
        """Write completions and their scores; with token ids and logprobs if asked for (several times the size)."""
        for group in groups:
            prompt = {"prompt_id": group.prompt.id}
            if prompt_text is not None:
                prompt["prompt"] = prompt_text(group.prompt)
            for member, (done, score) in enumerate(zip(group.completions_G, group.scores_G, strict=True)):
                line = {"iteration": iteration, "kind": kind, **prompt, "member": member, "text": done.text}
                line |= {"reward": score.value, "passed": score.passed, "detail": score.detail}
                line |= {"tokens": len(done.token_ids_T), "finish_reason": done.finish_reason}
                line |= {"weight_version": done.weight_version}
                if logprobs:
                    line |= {"token_ids": done.token_ids_T, "logprobs": done.logprobs_T}
                self._rollouts.write(_to_json(line) + "\n")

    def step(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record one iteration with the spans since the last one and print its progress line; the numbers recorded.

        Where `metrics` has rollout/tokens, perf/tokens_per_s is that over the seconds of the whole iteration.
        """
        now = time.perf_counter()
        whole, self._last_step = now - self._last_step, now
        self._recent = [*self._recent[-19:], whole]
        timing = {f"timing_s/{path}": seconds for path, seconds in self._seconds.items()}
        self._seconds.clear()
        record = {**metrics, **timing, "timing_s/iteration": whole}
        if "rollout/tokens" in record:
            record["perf/tokens_per_s"] = record["rollout/tokens"] / whole
        self._metrics.write(_to_json({"iteration": iteration, "time": round(time.time(), 3), **record}) + "\n")
        self._trace.flush()
        for name, tracker in self._trackers.items():
            self._try(name, lambda tracker=tracker: tracker.log(iteration, record))
        left = None if self._total is None else median(self._recent) * (self._total - 1 - iteration)
        self._echo(progress_line(iteration, self._total, record, left))
        return record

    def close(self) -> None:
        """Finish all files; may be called again."""
        if not self._trace.closed:
            self._trace.write("\n]\n")
        for file in (self._trace, self._metrics, self._rollouts):
            file.close()
        trackers, self._trackers = self._trackers, {}
        for name, tracker in trackers.items():
            self._try(name, tracker.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """A server that is away for a while costs its numbers, which `metrics.jsonl` has too, and not the run."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - what a tracker's package raises is its own
            if name not in self._silent:
                self._silent.add(name)
                self._echo(
                    f"tracker {name} failed: {error!r}; it is tried again each iteration and not told again, "
                    f"all numbers are in {self.folder / METRICS}"
                )

    def _open(self, name: str, resume_after: int | None) -> IO[str]:
        path = self.folder / name
        if resume_after is None:
            _set_aside(path)
        else:
            _drop_after(path, resume_after)
        return path.open("a", buffering=1, encoding="utf-8", errors=HALF_PAIRS)


_PROGRESS = (
    ("rollout/reward", "reward", "{:.3f}"),
    ("rollout/pass_rate", "pass", "{:.3f}"),
    ("eval/pass_rate", "held-out", "{:.3f}"),
    ("train/loss", "loss", "{:+.4f}"),
    ("train/grad_norm", "grad", "{:.2f}"),
    ("train/kl_ref", "kl_ref", "{:.1e}"),
    ("train/kl_old", "kl_old", "{:.1e}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("train/logprob_gap_max", "gap", "{:.1e}"),
)


def progress_line(iteration: int, total: int | None, record: Mapping[str, float], seconds_left: float | None) -> str:
    """One line for people; numbers the record does not have are left out.

    >>> progress_line(2, 60, {"rollout/reward": 0.5, "timing_s/train": 1.25, "timing_s/iteration": 1.5}, 85.5)
    '[ 3/60] reward 0.500 | train 1.2s | 1.5 s/it, eta 0:01:26'
    """
    count = str(iteration + 1) if total is None else f"{iteration + 1:{len(str(total))}}/{total}"
    if total is not None and iteration >= total:
        count, seconds_left = "end", None
    numbers = [f"{label} {form.format(record[name])}" for name, label, form in _PROGRESS if name in record]
    phases = {name.removeprefix("timing_s/"): value for name, value in record.items() if name.startswith("timing_s/")}
    whole = phases.pop("iteration", None)
    outer = [f"{phase} {seconds:.1f}s" for phase, seconds in phases.items() if "/" not in phase]
    pace = [] if whole is None else [f"{whole:.1f} s/it"]
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        pace.append(f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    parts = [" ".join(numbers), " ".join(outer), ", ".join(pace)]
    return f"[{count}] " + " | ".join(part for part in parts if part)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run, [] if there is none; a half-written last line (a crash) is left out.

    Raises `DataError` for any other line that is not a JSON object.
    """
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}, line {number} is not JSON ({error}); remove or repair that line") from error
        if not isinstance(record, dict) or "iteration" not in record:
            raise DataError(f"{path}, line {number} is no record of a run: it has no 'iteration'; remove that line")
        records.append(record)
    return records


def _to_json(record: Mapping[str, Any]) -> str:
    def number(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: number(value) for name, value in record.items()}, ensure_ascii=False, allow_nan=False)


def _drop_after(path: Path, iteration: int) -> None:
    kept = [record for record in read_lines(path) if record["iteration"] <= iteration]
    fresh = path.with_suffix(".tmp")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    fresh.write_text("".join(lines), encoding="utf-8", errors=HALF_PAIRS)
    fresh.replace(path)


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        path.rename(_free_path(path))


def _free_path(path: Path, before_suffix: bool = False) -> Path:
    number = 0
    while True:
        name = f"{path.stem}.{number}{path.suffix}" if before_suffix else f"{path.name}.{number}"
        if not (candidate := path.with_name(name)).exists():
            return candidate
        number += 1
