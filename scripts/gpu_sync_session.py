#!/usr/bin/env python3
"""Everything that weight updates have to show on a GPU host, in one go: python scripts/gpu_sync_session.py [--dry-run]

Steps run in order of what they need, each under its own deadline; one that fails or hangs costs its own time only.

    doctor       what of this host will not work
    digest       the Triton digest against torch's, and how fast each reads
    tiny-N       `bench sync` of the example's model in fp32 on N GPUs: stock, generic, direct, and the all_to_all limit
    merge        the merging kernel against torch
    copy         an engine rank's passes over a delivery against a bare copy
    30b-N        the direct path alone for Qwen3-30B-A3B's shape with random weights in bf16, trainer EP N, engine TP N,
                 LoRA 32: each size of buckets with two buffers of each kind and with one; which was the fastest
    soak         200 updates of the small model by the direct path
    methods      the sync methods against each other, the small model on two GPUs
    experts      an engine that serves adapters of experts, too (SGLang's triton backend), against the direct path
    paths-N      stock, generic and direct for the large model, with a profile of one direct update

Results go to OUT (--out, else $OUT, else build/gpu_sync): session.json with every result, written after each step, and
session.log with all output. A second call goes on where the first one stopped (--again NAME repeats a step). With
--deadline-s no step is started that may not end in time. --rehearse runs the same program on a CPU with two ranks, with
the small model for the large one: it proves the script, not the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # nothing is installed on a GPU host

from megatron_sglang import signals  # noqa: E402

TINY, LARGE = "examples/tiny_fim/model", "examples/qwen3_30b_a3b"
ENGINE_TP_OF_TINY = 2
"""It has two key-value heads."""
COMMAND = "import sys; from megatron_sglang.cli import main; sys.exit(main())"
BUCKETS = (240_000_000, 330_000_000, 480_000_000)
"""Of 8 GPUs one, two and three layers. With two buffers of each kind the first takes 1 GB, with one the last."""
METHODS = "direct,generic,disk,merge-on-engine,adapter"
"""`restart` starts the engine anew for each version: half a minute each, and nothing of it is the GPU's."""
TARGETS = {"median_s_on_8": 0.15, "generic_over_direct": 20.0, "direct_over_limit": 6.0, "extra_device_bytes": 1e9}
GRACE_S = 30.0
LAST_CHARS = 3000


@dataclass(frozen=True)
class Step:
    """One command; its result is the JSON file that it writes, where it writes one."""

    name: str
    arguments: tuple[str, ...]
    timeout_s: int
    environment: dict[str, str]
    result: bool = True


def steps(gpus: int, rehearse: bool, random_tiny: str) -> list[Step]:
    """gpus: how many there are; rehearsing, ranks on the CPU."""
    sizes = [size for size in (1, 2, 4, 8) if size <= gpus]
    most = sizes[-1]
    python = sys.executable
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}
    merge = (python, "benchmarks/merge_speed.py", "--experts", "1" if rehearse else "16", "--output", "{result}")
    copy = (python, "benchmarks/copy_speed.py", "--megabytes", "1" if rehearse else "490", "--output", "{result}")
    digest = (python, "benchmarks/digest_speed.py", "--megabytes", "2" if rehearse else "2048", "--output", "{result}")
    found = [
        Step("doctor", (python, "-c", COMMAND, "doctor"), 120, {}, result=False),
        Step("digest", digest, 240, interpreter),
        Step("merge", merge, 240, interpreter),
        Step("copy", copy, 240, interpreter),
    ]
    grouped = () if rehearse else ("--moe-grouped-gemm",)
    small = ("--hf-model", TINY, "--dtype", "float32", "--bucket-bytes", "1000000", *grouped)
    for size in reversed(sizes):
        tp = min(size, ENGINE_TP_OF_TINY)
        found.append(_bench(f"tiny-{size}", size, tp, 420, *small, "--syncs", "5" if rehearse else "20"))
    model, dtype = (random_tiny, "float32") if rehearse else (LARGE, "bfloat16")
    buckets = (300_000, 1_000_000) if rehearse else BUCKETS
    large = ("--hf-model", model, "--random-weights", "--dtype", dtype, "--lora-rank", "32", *grouped)
    large += ("--syncs", "5", "--warm-up", "1")
    # 61 GB of weights are on each side; with one GPU both are on it.
    memory = {1: ("--mem-fraction", "0.48")} if not rehearse else {}
    sweep = ("--paths", "direct", "--bucket-bytes", str(buckets[0]), "--also-buckets", *map(str, buckets[1:]))
    for size in reversed(sizes):
        more = (*sweep, "--also-buffers", "2", *memory.get(size, ()))
        found.append(_bench(f"30b-{size}", size, size, 300, *large, *more))
    soak = ("--paths", "direct", "--syncs", "10" if rehearse else "200")
    found.append(_bench("soak", most, min(most, ENGINE_TP_OF_TINY), 500, *small, *soak))
    two = min(most, ENGINE_TP_OF_TINY)
    few = ("--lora-rank", "8", "--syncs", "3", "--warm-up", "1")
    methods = ("--methods", METHODS, "--lora-targets", "linear_qkv,linear_proj", *few)
    found.append(_bench("methods", two, two, 500, *small, *methods))
    if not rehearse:  # a CPU cannot serve them
        found.append(_bench("experts", two, two, 300, *small, "--methods", "direct,adapter", *few))
    for size in reversed(sizes):
        # Without others to share the work, the slow paths take minutes.
        paths = ("--paths", "direct") if size == 1 < most else ()
        bucket = ("--bucket-bytes", str(buckets[-1]), "--profile", "{profile}")
        found.append(_bench(f"paths-{size}", size, size, 580, *large, *bucket, *memory.get(size, ()), *paths))
    return found


def _bench(name: str, ranks: int, engine_tp: int, timeout_s: int, *arguments: str) -> Step:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    program = ("--no-python", sys.executable, "-c", COMMAND, "bench", "sync")
    layout = ("--engine-tp", str(engine_tp), "--expert-model-parallel-size", str(ranks), "--output", "{result}")
    return Step(name, (*launcher, *program, *arguments, *layout), timeout_s, {})


def run(step: Step, out: Path, work: Path) -> dict[str, Any]:
    """What became of it: seconds, exit status, the result or the last words."""
    result, profile = work / f"{step.name}.json", work / f"{step.name}.profile"
    result.unlink(missing_ok=True)
    command = [argument.format(result=result, profile=profile) for argument in map(_escaped, step.arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | step.environment
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.monotonic()
    with (out / "session.log").open("a+") as log:
        log.write(f"\n===== {step.name}: {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status: int | str = child.wait(step.timeout_s)
        except subprocess.TimeoutExpired:
            status = f"ended after {step.timeout_s} s"
        finally:
            _end(child)
        log.seek(start)
        said = log.read()
    found: dict[str, Any] = {"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if result.is_file():
        found["result"] = json.loads(result.read_text())
        if "command" in found["result"]:  # where it was written on this host is of no use elsewhere
            found["result"]["command"] = found["result"]["command"].partition(" --output")[0]
    if profile.is_file():
        found["profile"] = profile.read_text().splitlines()
    if status != 0 or not step.result:
        found["said"] = said[-LAST_CHARS:].splitlines()
    return found


def _escaped(argument: str) -> str:
    """Only our own names in braces are replaced."""
    return argument if argument in ("{result}", "{profile}") else argument.replace("{", "{{").replace("}", "}}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """The command and what it started in its own session; the engine ends with the rank that started it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
            return


def count_gpus() -> int:
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def summary(records: Sequence[dict[str, Any]], targets: dict[str, float]) -> str:
    """One line a step, then the targets."""
    lines = []
    for record in records:
        text = f"{record['step']:14} {record['status']!s:>8} {record['seconds']:7.0f} s  "
        for name, path in record.get("result", {}).get("paths", {}).items():
            text += f"{name} {path['seconds']['total']['median']:.3f} s  "
        if ratio := record.get("result", {}).get("direct_over_limit"):
            text += (
                f"({ratio:.1f} x all_to_all, {record['result']['paths']['direct']['extra_device_bytes'] / 1e6:.0f} MB)"
            )
        for name, one in record.get("result", {}).get("methods", {}).items():
            text += f"{name} {one['seconds']['median']:.3f} s  "
        ratios = {name: one for name, one in record.get("result", {}).items() if name.startswith("ours_over_")}
        text += "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        if switch := record.get("result", {}).get("seconds", {}).get("switch"):
            text += f"switch {switch['median']:.3f} s"
        lines.append(text.rstrip())
        if record.get("result", {}).get("direct_with_buffers"):
            lines += [f"{'':4}{line}" for line in _table(record["result"])]
    return "\n".join([*lines, f"targets: {targets}"])


def _table(found: dict[str, Any]) -> list[str]:
    """The direct path's sizes of buckets and numbers of buffers."""
    from megatron_sglang.bench import result

    return result.variants(found)


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What every session takes. out: folder of its results below build."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / out)))
    add("--only", nargs="+", default=[], metavar="NAME", help="these steps")
    add("--again", nargs="+", default=[], metavar="NAME", help="also if they were done")
    add("--deadline-s", type=float, default=float("inf"), help="start nothing that may end later")
    add("--gpus", type=int, help="instead of counting them")
    add("--dry-run", action="store_true", help="print the steps")
    add("--rehearse", action="store_true", help="two ranks on the CPU")


def session(
    chosen: argparse.Namespace, steps_of: Callable[[int, str], Sequence[Step]], targets: dict[str, float]
) -> int:
    """Run what was `chosen`, or print it. steps_of: from the number of GPUs, or of ranks where it is rehearsed, and a
    folder with the small model's config.json alone. Returns the exit status; SystemExit with 128 + signal."""
    began = time.monotonic()
    ending = signals.not_ignored(signal.SIGTERM, signal.SIGHUP)
    with (
        signals.handled(lambda number, _: sys.exit(128 + number), *ending),  # so that the step under way is ended too
        tempfile.TemporaryDirectory() as temporary,
    ):
        gpus = chosen.gpus or (2 if chosen.rehearse else count_gpus())
        if not gpus:
            print("no GPU is visible; --rehearse runs the same on a CPU, --dry-run --gpus 8 shows the plan")
            return 1
        work = Path(temporary)
        tiny = work / "tiny"
        tiny.mkdir()
        shutil.copy(ROOT / TINY / "config.json", tiny)
        known = steps_of(gpus, str(tiny))
        if strange := {*chosen.only, *chosen.again} - {step.name for step in known}:
            print(f"no step: {', '.join(sorted(strange))}; expected some of {', '.join(step.name for step in known)}")
            return 2
        planned = [step for step in known if step.name in chosen.only or not chosen.only]
        if chosen.dry_run:
            for step in planned:
                print(f"{step.name} (at most {step.timeout_s} s)\n    {' '.join(step.arguments)}")
            print(f"{len(planned)} steps, at most {sum(step.timeout_s for step in planned)} s")
            return 0
        return run_all(planned, chosen, work, began, targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "gpu_sync")
    chosen = parser.parse_args()
    return session(chosen, lambda gpus, tiny: steps(gpus, chosen.rehearse, tiny), TARGETS)


def run_all(
    planned: Sequence[Step], chosen: argparse.Namespace, work: Path, began: float, targets: dict[str, float]
) -> int:
    """All that are not done yet; 0 if all of them have gone well. chosen: out, again, deadline_s."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "session.json"
    records = {record["step"]: record for record in json.loads(path.read_text())} if path.exists() else {}
    for step in planned:
        if records.get(step.name, {}).get("status") == 0 and step.name not in chosen.again:
            continue
        if time.monotonic() - began + step.timeout_s > chosen.deadline_s:
            print(f"{step.name}: not started, it may need {step.timeout_s} s", flush=True)
            continue
        record = records[step.name] = run(step, chosen.out, work)
        path.write_text(json.dumps(list(records.values()), indent=1) + "\n")
        print(summary([record], targets).rpartition("\n")[0], flush=True)
    print(summary(list(records.values()), targets))
    return 0 if all(records.get(step.name, {}).get("status") == 0 for step in planned) else 1


if __name__ == "__main__":
    sys.exit(main())
