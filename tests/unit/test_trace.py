import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_sglang.errors import ConfigError, DataError, SetupError
from megatron_sglang.trace import RunLog, progress_line, read_lines
from megatron_sglang.types import Completion, Prompt, RolloutGroup, Score

GROUP = RolloutGroup(
    Prompt("int/7", (5, 6), "test"),
    (Completion((1, 0), (-0.5, -0.25), "stop", 3, text='a = "ü"\n'), Completion((1, 2), (-0.5, -1.0), "length", 3)),
    (Score(1.0, True), Score(0.0, False, "1 of 4 failed")),
)


def run(folder: Path, iterations: range, **options: Any) -> list[str]:
    lines: list[str] = []
    with RunLog(folder, echo=lines.append, **options) as log:
        for iteration in iterations:
            log.rollouts(iteration, [GROUP])
            log.step(iteration, {"train/loss": iteration / 4})
    return lines


def test_an_iteration_is_on_disk_as_soon_as_it_is_over(tmp_path: Path) -> None:
    """Not only at close: a run that is killed keeps what it has done."""
    log = RunLog(tmp_path, echo=lambda line: None)
    with log.span("train"):
        log.rollouts(0, [GROUP])
    log.step(0, {"train/loss": 0.5})
    (record,) = read_lines(tmp_path / "metrics.jsonl")
    assert (record["iteration"], record["train/loss"]) == (0, 0.5)
    assert len(read_lines(tmp_path / "rollouts.jsonl")) == 2
    assert '"train"' in (tmp_path / "trace.0.json").read_text()
    log.close()


def test_spans_nest_and_their_seconds_belong_to_one_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, echo=lambda line: None) as log:
        with log.span("rollout"):
            for _ in range(2):
                with log.span("generate"):
                    sum(range(10_000))
        first, second = log.step(0, {}), log.step(1, {})
    assert set(first) == {"timing_s/rollout", "timing_s/rollout/generate", "timing_s/iteration"}
    assert 0 < first["timing_s/rollout/generate"] <= first["timing_s/rollout"] <= first["timing_s/iteration"]
    assert set(second) == {"timing_s/iteration"}
    events = json.loads((tmp_path / "trace.0.json").read_text())
    spans = {event["cat"]: event for event in events if event["ph"] == "X"}
    assert len(events) == 4
    outer, inner = spans["rollout"], spans["rollout/generate"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 2  # microseconds, each rounded


def test_a_span_that_fails_is_still_recorded_and_closed(tmp_path: Path) -> None:
    """Otherwise every later phase would appear to be inside the failed one."""
    with RunLog(tmp_path, echo=lambda line: None) as log:
        with pytest.raises(ValueError, match="boom"), log.span("publish"):
            raise ValueError("boom")
        with log.span("train"):
            pass
        assert set(log.step(0, {})) == {"timing_s/publish", "timing_s/train", "timing_s/iteration"}


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, echo=lambda line: None) as log:
        log.step(0, {"train/loss": math.nan, "train/ratio": math.inf})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["train/loss"], record["train/ratio"]) == ("nan", "inf")


def test_rollouts_hold_one_line_per_completion(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.rollouts(4, [GROUP], kind="eval", prompt_text=lambda prompt: f"<{prompt.id}>", logprobs=True)
    first, second = read_lines(tmp_path / "rollouts.jsonl")
    assert first == {
        "iteration": 4,
        "kind": "eval",
        "prompt_id": "int/7",
        "prompt": "<int/7>",
        "member": 0,
        "text": 'a = "ü"\n',
        "reward": 1.0,
        "passed": True,
        "detail": "",
        "tokens": 2,
        "finish_reason": "stop",
        "weight_version": 3,
        "token_ids": [1, 0],
        "logprobs": [-0.5, -0.25],
    }
    assert (second["member"], second["reward"], second["finish_reason"]) == (1, 0.0, "length")


def test_half_a_surrogate_pair_is_written_and_resumed(tmp_path: Path) -> None:
    """A reward of the user's may give such text; a run must not end by it."""
    odd = RolloutGroup(GROUP.prompt, GROUP.completions_G, (Score(1.0, True, "\udc80"), Score(0.0, False, "ü")))
    for options in ({}, {"resume_after": 0}):
        with RunLog(tmp_path, echo=lambda line: None, **options) as log:
            log.rollouts(len(options), [odd])
    details = [record["detail"] for record in read_lines(tmp_path / "rollouts.jsonl")]
    assert details == ["\udc80", "ü"] * 2


def test_resuming_drops_what_came_later_and_a_half_written_line(tmp_path: Path) -> None:
    run(tmp_path, range(4))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"iteration": 4, "train/lo')
    run(tmp_path, range(2, 5), resume_after=1)
    assert [record["iteration"] for record in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [record["iteration"] for record in read_lines(tmp_path / "rollouts.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert json.loads((tmp_path / "trace.0.json").read_text()) != json.loads((tmp_path / "trace.1.json").read_text())


def test_a_new_run_in_a_used_folder_keeps_the_old_records_aside(tmp_path: Path) -> None:
    for iterations in (3, 2, 1):
        run(tmp_path, range(iterations))
    lengths = {path.name: len(read_lines(path)) for path in tmp_path.glob("metrics.jsonl*")}
    assert lengths == {"metrics.jsonl.0": 3, "metrics.jsonl.1": 2, "metrics.jsonl": 1}


def test_throughput_counts_response_tokens_over_the_whole_iteration(tmp_path: Path) -> None:
    with RunLog(tmp_path, echo=lambda line: None) as log:
        record = log.step(0, {"rollout/tokens": 512.0})
    assert record["perf/tokens_per_s"] == 512.0 / record["timing_s/iteration"]


def test_the_configuration_is_in_the_folder_before_the_first_iteration(tmp_path: Path) -> None:
    config = {"seed": 1, "lora": {"targets": ("linear_qkv", "linear_fc1"), "dropout": 0.0}, "engine": {"tp_size": None}}
    with RunLog(tmp_path, config=config):
        found = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert found == {**config, "lora": {"targets": ["linear_qkv", "linear_fc1"], "dropout": 0.0}}


def test_tensorboard_gets_every_number_and_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(4), trackers=("tensorboard",))
    run(tmp_path, range(2, 3), trackers=("tensorboard",), resume_after=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


@pytest.mark.parametrize(("tracker", "module"), [("mlflow", "mlflow"), ("wandb", "wandb")])
def test_a_missing_tracker_names_the_package_to_install(
    tracker: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=f"asks for {module}, which is not installed"):
        RunLog(tmp_path, trackers=(tracker,))
    with pytest.raises(ConfigError, match="'comet' is unknown; use tensorboard"):
        RunLog(tmp_path, trackers=("comet",))


def test_a_tracker_that_fails_costs_its_numbers_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def log_metrics(_: Any, step: int) -> None:
        if step in (1, 2):
            raise ConnectionError("503")
        seen.append(step)

    def end_run() -> None:
        raise ConnectionError("gone")

    package = SimpleNamespace(
        start_run=lambda **_: None, log_dict=lambda *_: None, log_metrics=log_metrics, end_run=end_run
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    lines = run(tmp_path, range(4), trackers=("mlflow",))
    assert seen == [0, 3]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4
    [said] = [line for line in lines if "tracker" in line]
    assert said.startswith("tracker mlflow failed: ConnectionError('503'); it is tried again")


def test_no_metric_of_mlflow_is_the_folder_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store of files keeps each metric in a file of the metric's name."""
    store = tmp_path / "mlruns"

    def log_metrics(found: dict[str, float], step: int) -> None:
        for name, value in found.items():
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            with (store / name).open("a") as file:
                file.write(f"{value} {step}\n")

    package = SimpleNamespace(
        start_run=lambda **_: None, log_dict=lambda *_: None, log_metrics=log_metrics, end_run=lambda: None
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    said: list[str] = []
    with RunLog(tmp_path, trackers=("mlflow",), echo=said.append) as log:
        for iteration in range(2):
            with log.span("rollout"), log.span("generate"):
                pass
            log.step(iteration, {"eval/pass_rate": 0.5, "eval/pass_rate/easy": 1.0})
    assert not [line for line in said if "tracker" in line]
    assert (store / "eval" / "pass_rate").read_text() == "0.5 0\n0.5 1\n"
    assert {"rollout", "rollout.generate"} <= {path.name for path in (store / "timing_s").iterdir()}


def test_the_progress_line_shows_what_there_is() -> None:
    record = {
        "rollout/reward": 0.5,
        "train/loss": -0.01234,
        "train/logprob_gap_max": 1.26e-6,
        "timing_s/rollout": 3.14,
        "timing_s/rollout/generate": 3.0,
        "timing_s/train": 2.0,
        "timing_s/iteration": 5.5,
        "perf/tokens_per_s": 100.0,
    }
    line = progress_line(2, 60, record, 3725.4)
    assert line == "[ 3/60] reward 0.500 loss -0.0123 gap 1.3e-06 | rollout 3.1s train 2.0s | 5.5 s/it, eta 1:02:05"
    assert progress_line(2, None, {"eval/pass_rate": 0.25}, None) == "[3] held-out 0.250"
    assert progress_line(60, 60, {"eval/pass_rate": 0.25}, -5.5) == "[end] held-out 0.250"


def test_each_iteration_prints_one_line_with_the_time_left(tmp_path: Path) -> None:
    lines = run(tmp_path, range(3), total=3)
    assert [line.split("]")[0] for line in lines] == ["[1/3", "[2/3", "[3/3"]
    assert lines[-1].endswith("eta 0:00:00")


@pytest.mark.parametrize("line", ['{"iteration": 1', '{"x": 1}', "[1]"])
def test_a_broken_line_in_the_middle_is_named_not_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{line}\n{{"iteration": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_lines(path)
