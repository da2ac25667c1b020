"""What `bench sync` writes and prints."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sglang.bench.sync import Findings
    from megatron_sglang.types import SyncReport

PACKAGES = ("torch", "sglang", "megatron-core", "megatron-bridge", "transformer-engine")
PHASES = {"begin": ("begin",), "load": ("load", "gather", "flatten", "hand_over"), "verify": ("verify",)}
"""Phase -> those of one path's report that make it up."""


def of(
    args: argparse.Namespace,
    ranks: int,
    found: Findings,
    difference: Mapping[str, Any] | None,
    held: Sequence[Mapping[str, int]],
    limit: float,
    pairs: Mapping[tuple[int, int], int],
) -> dict[str, Any]:
    """JSON values. held: by version, warm-up included; limit: seconds; pairs: bytes by trainer ranks."""
    from megatron_sglang.bench import meter

    paths = {name: of_path(reports, found.device_peaks[name]) for name, reports in found.reports.items()}
    median = {name: path["seconds"]["total"]["median"] for name, path in paths.items()}
    measured = held[args.warm_up :]

    def over_direct(name: str) -> float | None:
        return median[name] / median["direct"] if {name, "direct"} <= median.keys() else None

    return {
        "command": "megatron-sglang " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "device": device(),
        "load_average": os.getloadavg()[1],
        "ranks": ranks,
        "warm_up": args.warm_up,
        "syncs": args.syncs,
        "bucket_bytes": args.bucket_bytes,
        "paths": paths,
        "generic_over_direct": over_direct("generic"),
        "stock_over_direct": over_direct("stock"),
        "all_to_all_limit_s": limit,
        "direct_over_limit": median["direct"] / limit if limit and "direct" in median else None,
        "weights_checker": {
            "seconds": meter.spread(found.checker_seconds) if found.checker_seconds else None,
            "generic_equals_direct": True if {"generic", "direct"} <= paths.keys() else None,
            "stock_equals_ours": not found.odd if "stock" in paths and len(paths) > 1 else None,
            "parameters_of_all_ranks": found.parameters,
            "parameters_where_stock_differs": len(found.odd),
            "stock_difference": difference,
        },
        "planned_bytes": sum(pairs.values()),
        "crossing_bytes": sum(size for (source, target), size in pairs.items() if source != target),
        "bytes_moved_as_planned": True if "direct" in paths else None,
        "p99_over_median": {name: path["seconds"]["total"]["p99"] / median[name] for name, path in paths.items()},
        "held": {name: meter.spread([one[name] for one in measured]) for name in measured[0]},
        "held_first_and_last": [measured[0], measured[-1]],
    }


def of_path(reports: Sequence[SyncReport], device_peak: int) -> dict[str, Any]:
    """Spread of the seconds: all, by phase, by what a path names itself; sizes and fidelity of the last version."""
    from megatron_sglang.bench import meter

    names = {name: (name,) for name in reports[0].seconds} | PHASES
    seconds = {
        phase: meter.spread([sum(report.seconds.get(part, 0.0) for part in parts) for report in reports])
        for phase, parts in names.items()
    }
    total = meter.spread([sum(report.seconds.values()) for report in reports])
    last = reports[-1]
    return {
        "seconds": {"total": total, **seconds},
        "each": [round(sum(report.seconds.values()), 5) for report in reports],
        "buckets": last.buckets,
        "bytes": last.bytes,
        "extra_device_bytes": device_peak,
        "cast_loss": last.fidelity.cast_loss,
        "update_norm": last.fidelity.update_norm,
    }


def table(found: Mapping[str, Any]) -> str:
    """Lines for people."""
    names = ("min", "median", "p99", "max")
    lines = [
        f"{'path':8} {'buckets':>8} {'MB':>10} {'min s':>8} {'median':>8} {'p99':>8} {'max':>8} {'over direct':>12}"
    ]
    for name, path in found["paths"].items():
        total = path["seconds"]["total"]
        ratio = found.get(f"{name}_over_direct")
        numbers = " ".join(f"{total[key]:8.3f}" for key in names)
        shown = f"{ratio:11.1f}x" if ratio else ""
        lines.append(f"{name:8} {path['buckets']:8} {path['bytes'] / 1e6:10.1f} {numbers} {shown}".rstrip())
    lines += variants(found)
    limit = f"all_to_all of the same bytes alone: {found['all_to_all_limit_s']:.4f} s"
    if found["direct_over_limit"]:
        limit += f"; direct takes {found['direct_over_limit']:.1f} times as long; bytes and calls as planned"
    lines.append(limit)
    checked = found["weights_checker"]
    if checked["generic_equals_direct"]:
        lines.append("SGLang's checksums after generic and direct path: equal")
    if checked["stock_equals_ours"]:
        lines.append("after stock: equal to them")
    elif checked["stock_equals_ours"] is False:
        odd, difference = checked["parameters_where_stock_differs"], checked["stock_difference"]
        lines.append(
            f"after stock: {odd} of {checked['parameters_of_all_ranks']} parameters differ; of {difference['tensors']} "
            f"HF tensors {difference['different']}, by up to {difference['largest']:.3g} "
            f"(the update itself changes them by up to {difference['largest_update']:.3g})"
        )
    return "\n".join(lines)


LITTLE_MEMORY = 10**9
"""Bytes that an update may take of each GPU beside what is there."""


def variants(found: Mapping[str, Any]) -> list[str]:
    """The direct path with each size of buckets and number of buffers, and which was the fastest."""
    tried = [(found["buffers"], size, path) for size, path in found["direct_with_buckets"].items()]
    tried += [(int(n), size, path) for n, sizes in found["direct_with_buffers"].items() for size, path in sizes.items()]
    if "direct" in found["paths"]:
        tried.insert(0, (found["buffers"], found["bucket_bytes"], found["paths"]["direct"]))
    if len(tried) < 2:
        return []
    rows = [(path["seconds"]["total"]["median"], count, int(size), path) for count, size, path in tried]
    rows.sort(key=lambda row: row[:3])
    lines = [f"{'buffers':>7} {'a bucket':>12} {'buckets':>8} {'median s':>9} {'extra MB':>9}"]
    for median, count, size, path in rows:
        extra = path["extra_device_bytes"] / 1e6
        lines.append(f"{count:7} {size:12,} {path['buckets']:8} {median:9.3f} {extra:9.0f}")
    within = [row for row in rows if row[3]["extra_device_bytes"] <= LITTLE_MEMORY]
    for what, chosen in (("fastest", rows), (f"fastest within {LITTLE_MEMORY / 1e6:.0f} MB", within)):
        if chosen:
            median, count, size, _ = chosen[0]
            lines.append(f"{what}: {count} of each buffer, buckets of at most {size:,} bytes: {median:.3f} s")
    return lines


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device() -> str:
    """Name of the device that a number was measured on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"
