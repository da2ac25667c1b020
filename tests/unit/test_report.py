import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_sglang.errors import DataError
from megatron_sglang.report import write_report

RECORDS: list[dict[str, Any]] = [
    {
        "iteration": i,
        "train/loss": 0.1 * i,
        "train/kl_ref": 1e-3 * i,
        "rollout/reward": 0.2 + 0.1 * i,
        "train/logprob_gap_max": 1e-6,
        "timing_s/rollout": 2.0,
        "timing_s/rollout/generate": 1.5,
        "timing_s/iteration": 3.0,
        **({"eval/pass_rate": 0.25 + 0.05 * i, "eval/pass_rate/int": 0.5} if i % 2 == 0 else {}),
    }
    for i in range(5)
]
SAMPLE = {"iteration": 0, "kind": "train", "prompt_id": "p/1", "member": 0, "finish_reason": "stop"}


class Page(HTMLParser):
    """Tags and texts of a page, as a browser would take them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write(folder: Path, name: str, records: list[dict[str, Any]], tail: str = "") -> None:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")


def test_a_report_has_the_curves_the_run_recorded_and_needs_no_other_file(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", RECORDS)
    page = Page(write_report(tmp_path))
    images = {path.stem for path in (tmp_path / "report").iterdir()}
    assert images == {"reward", "held_out", "loss", "kl", "gap", "phases"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "report").iterdir())
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(images)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {tag for tag, _ in page.tags} & {"link", "script", "iframe"}
    assert "0.25 at first, 0.45 at last, 0.45 at most" in page.text
    assert "15.0, 3.00 per iteration" in page.text


def test_what_a_model_wrote_is_shown_not_executed(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>\"'<img src=x onerror=alert(1)>"
    write(tmp_path, "metrics.jsonl", RECORDS[:1])
    write(tmp_path, "rollouts.jsonl", [{**SAMPLE, "text": attack, "prompt": attack, "reward": 1.0, "passed": True}])
    page = Page(write_report(tmp_path))
    assert page.text.count(attack) == 2
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onerror" in attributes]


def test_samples_come_from_the_first_and_the_last_iteration(tmp_path: Path) -> None:
    samples = [
        {**SAMPLE, "iteration": i, "text": f"text {i}.{member}.", "reward": 0.0, "passed": False}
        for i in range(3)
        for member in range(30)
    ]
    write(tmp_path, "metrics.jsonl", RECORDS)
    write(tmp_path, "rollouts.jsonl", samples)
    text = Page(write_report(tmp_path)).text
    assert [text.count(f"text {i}.") for i in range(3)] == [20, 0, 20]


def test_a_crashed_run_with_nan_and_missing_columns_still_gives_a_report(tmp_path: Path) -> None:
    records = [{"iteration": 0, "train/loss": "nan", "train/entropy": "inf"}, {"iteration": 1, "train/loss": 0.5}]
    write(tmp_path, "metrics.jsonl", records, tail='{"iteration": 2, "train/lo')
    write(tmp_path, "rollouts.jsonl", [], tail='{"iteration": 2')
    page = Page(write_report(tmp_path))
    assert {path.stem for path in (tmp_path / "report").iterdir()} == {"loss"}
    assert "iterations with a non-finite loss1" in page.text.replace("\n", "")


@pytest.mark.parametrize("text", [None, "", '{"iteration": 0'])
def test_a_folder_without_iterations_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="holds no iterations"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
