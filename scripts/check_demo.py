#!/usr/bin/env python3
"""Fail unless a run has learned: python scripts/check_demo.py runs/tiny_cpu [least gain] [largest logprob gap].

The gain is that of the held-out pass rate, last evaluation against first (default 0.15; one standard error of an
evaluation on 576 problems is 0.02). The gap is between the trainer's and the engine's logprobs of the same tokens, the
largest of all tokens of the run (default 1e-5): if merged weights did not arrive, it is above 0.1. The KL to the base
before the first step must be 0.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from megatron_sglang.trace import METRICS, read_lines


def main(folder: str, least_gain: str = "0.15", largest_gap: str = "1e-5") -> int:
    records = read_lines(Path(folder) / METRICS)
    rates = [record["eval/pass_rate"] for record in records if "eval/pass_rate" in record]
    gaps = [float(record["train/logprob_gap_max"]) for record in records if "train/logprob_gap_max" in record]
    if len(rates) < 2 or not gaps:
        print(f"{folder}: {len(rates)} evaluations and {len(gaps)} train steps; expected at least 2 and 1")
        return 1
    gap = max(gaps, key=lambda gap: (math.isnan(gap), gap))  # max alone passes over a NaN that is not the first
    gain, first_kl = rates[-1] - rates[0], abs(float(records[0].get("train/kl_ref", "nan")))
    print(f"held-out pass rate {rates[0]:.3f} -> {rates[-1]:.3f} ({gain:+.3f}, wanted {least_gain} or more); ", end="")
    print(f"largest logprob gap {gap:.1e} over {len(gaps)} steps (wanted {largest_gap} or less)")
    print(f"KL to the base before the first step {first_kl:.1e} (wanted below 1e-9)")
    return 0 if gain >= float(least_gain) and gap <= float(largest_gap) and first_kl < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
