"""A run folder as one page: curves, phase times and samples, in report.html (self-contained) and report/*.png.

Reads metrics.jsonl and rollouts.jsonl and nothing else, so it works on a running or crashed run, and draws what
columns there are. All text of the run is escaped: completions are what a model wrote.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sglang.errors import DataError
from megatron_sglang.trace import METRICS, ROLLOUTS, read_lines

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Panel:
    """One figure: metric names to draw over the iteration; a trailing * draws all with that prefix."""

    file: str
    title: str
    names: tuple[str, ...]
    log_scale: bool = False


_PANELS = (
    _Panel("reward", "Reward and pass rate of the rollouts", ("rollout/reward", "rollout/pass_rate")),
    _Panel("held_out", "Held-out pass rate", ("eval/pass_rate", "eval/pass_rate/*")),
    _Panel("loss", "Policy loss", ("train/loss",)),
    _Panel("kl", "KL divergence (k3): reference, sampling policy", ("train/kl_ref", "train/kl_old")),
    _Panel("gap", "Trainer against engine, |logprob|", ("train/logprob_gap_max", "train/logprob_gap_mean"), True),
    _Panel("clip", "Clipped share", ("train/clip_fraction",)),
    _Panel("entropy", "Entropy, nats per token", ("train/entropy",)),
    _Panel("grad_norm", "Gradient norm", ("train/grad_norm",)),
    _Panel("length", "Response length, tokens", ("rollout/response_length",)),
    _Panel("groups", "Shares", ("rollout/informative_groups", "rollout/unique", "rollout/truncated")),
)
_SAMPLES = 40


def write_report(run_folder: Path | str) -> Path:
    """Write report.html and report/*.png into the folder; the page's path.

    Raises `DataError` if the folder holds no iteration yet.
    """
    folder = Path(run_folder)
    records = read_lines(folder / METRICS)
    if not records:
        raise DataError(f"{folder / METRICS} holds no iterations; give the folder of a run that has made at least one")
    images = folder / "report"
    images.mkdir(exist_ok=True)
    figures: list[dict[str, str]] = []
    for panel in _PANELS:
        if figure := _curves(panel, records):
            figures.append(_save(figure, images, panel.file, panel.title))
    if figure := _phases(records):
        figures.append(_save(figure, images, "phases", "Seconds per phase"))

    page = folder / "report.html"
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    samples = _samples(read_lines(folder / ROLLOUTS))
    title = f"Run {folder.resolve().name}"
    page.write_text(
        template.render(title=title, summary=_summary(records), figures=figures, samples=samples), encoding="utf-8"
    )
    return page


def _series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Iterations and values where the metric was recorded as a finite number."""
    points = [(record["iteration"], float(record[name])) for record in records if record.get(name) is not None]
    finite = [(iteration, value) for iteration, value in points if math.isfinite(value)]
    return [iteration for iteration, _ in finite], [value for _, value in finite]


def _names(records: Sequence[Record], patterns: Sequence[str]) -> list[str]:
    recorded = list(dict.fromkeys(name for record in records for name in record))
    chosen: list[str] = []
    for pattern in patterns:
        stem = pattern.removesuffix("*")
        chosen += [name for name in recorded if name == pattern or (stem != pattern and name.startswith(stem))]
    return [name for name in chosen if _series(records, name)[0]]


def _curves(panel: _Panel, records: Sequence[Record]) -> Figure | None:
    names = _names(records, panel.names)
    if not names:
        return None
    figure, axes = _axes()
    for name in names:
        iterations, numbers = _series(records, name)
        minor = name not in panel.names
        axes.plot(iterations, numbers, ".-", label=name, alpha=0.5 if minor else 1.0, linewidth=0.8 if minor else 1.6)
    if panel.log_scale and any(value > 0 for name in names for value in _series(records, name)[1]):
        axes.set_yscale("log", nonpositive="mask")
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(names) > 4 else 1)
    return figure


def _phases(records: Sequence[Record]) -> Figure | None:
    """Outermost spans stacked; the rest of an iteration is what no span covers."""
    names = [name for name in _names(records, ("timing_s/*",)) if name.count("/") == 1 and name != "timing_s/iteration"]
    if not names:
        return None
    figure, axes = _axes()
    iterations = [record["iteration"] for record in records]
    bottom = [0.0] * len(records)
    for name in names:
        seconds = [float(record.get(name, 0.0)) for record in records]
        axes.bar(iterations, seconds, bottom=bottom, width=1.0, label=name.removeprefix("timing_s/"))
        bottom = [below + height for below, height in zip(bottom, seconds, strict=True)]
    axes.legend(fontsize=7, framealpha=0.8, ncols=3)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.0), dpi=110)
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.16, top=0.91)  # a layout that is computed draws all twice
    axes = figure.add_subplot()
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, folder: Path, name: str, title: str) -> dict[str, str]:
    figure.axes[0].set_title(title, fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    (folder / f"{name}.png").write_bytes(png.getvalue())
    return {"title": title, "data": base64.b64encode(png.getvalue()).decode()}


def _summary(records: Sequence[Record]) -> list[tuple[str, str]]:
    rows = [("iterations", str(len(records)))]
    for name in ("rollout/reward", "rollout/pass_rate", "eval/pass_rate", "train/loss", "train/kl_ref"):
        _, numbers = _series(records, name)
        if numbers:
            rows.append((name, f"{numbers[0]:.4g} at first, {numbers[-1]:.4g} at last, {max(numbers):.4g} at most"))
    _, gaps = _series(records, "train/logprob_gap_max")
    _, seconds = _series(records, "timing_s/iteration")
    rows += [("largest logprob gap, trainer against engine", f"{max(gaps):.2e}")] if gaps else []
    rows += [("seconds", f"{sum(seconds):.1f}, {sum(seconds) / len(seconds):.2f} per iteration")] if seconds else []
    bad = sum(1 for record in records if not math.isfinite(float(record.get("train/loss", 0.0))))
    return [*rows, ("iterations with a non-finite loss", str(bad))]


def _samples(rollouts: Sequence[Record]) -> list[Record]:
    """Completions of the first and the last recorded iteration, half of the table each."""
    if not rollouts:
        return []
    first, last = (pick(record["iteration"] for record in rollouts) for pick in (min, max))
    shown: list[Record] = []
    for iteration in dict.fromkeys((first, last)):
        shown += [record for record in rollouts if record["iteration"] == iteration][: _SAMPLES // 2]
    return shown


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid #ddd; padding: .25rem .5rem;
text-align: left; vertical-align: top; } pre { margin: 0; white-space: pre-wrap; font-size: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: .75rem; margin: 1rem 0; }
img { width: 100%; } .passed { color: #18733a; } .failed { color: #a3261c; }
</style></head><body>
<h1>{{ title }}</h1>
<table>{% for name, text in summary %}<tr><th>{{ name }}</th><td>{{ text }}</td></tr>{% endfor %}</table>
<div class="figures">{% for figure in figures %}
<img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.data }}">{% endfor %}
</div>
{% if samples %}<h2>Samples</h2>
<table><tr><th>iteration</th><th>prompt</th><th>completion</th><th>reward</th><th>ended by</th></tr>
{% for sample in samples %}<tr><td>{{ sample.iteration }} {{ sample.kind }}</td>
<td>{{ sample.prompt_id }}{% if sample.prompt is defined %}<pre>{{ sample.prompt }}</pre>{% endif %}</td>
<td><pre>{{ sample.text }}</pre></td>
<td class="{{ 'passed' if sample.passed else 'failed' }}">{{ sample.reward }}</td>
<td>{{ sample.finish_reason }}</td></tr>
{% endfor %}</table>{% endif %}
</body></html>
"""
