"""From the leader's samples to every rank's micro-batches, with the experts of every token: seconds and host memory.

    python benchmarks/samples.py [--samples 64] [--tokens 1024] [--layers 48] [--top-k 8] [--ranks 2]

All ranks train on different samples (data parallelism). Memory is a process's highest resident set above what it had
before, the leader's own samples not counted.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path[:0] = [str(Path(__file__).parents[1])]

from megatron_sglang import batching, routing  # noqa: E402
from megatron_sglang.comm import TorchComm  # noqa: E402
from megatron_sglang.samples import to_all  # noqa: E402
from megatron_sglang.types import TrainSample  # noqa: E402

EXPERTS = 128


def make(args: argparse.Namespace) -> list[TrainSample]:
    draw = torch.Generator().manual_seed(1)
    half = args.tokens // 2
    made = []
    for number in range(args.samples):
        told = torch.randint(0, EXPERTS, (args.tokens - 1, args.layers * args.top_k), generator=draw, dtype=torch.int32)
        routed = routing.of_engine(base64.b64encode(told.numpy().tobytes()).decode(), args.tokens - 1)
        ids = tuple(range(number, number + half))
        made.append(TrainSample(ids, ids, (-0.1234567890123,) * half, 0.5, 1.0, 3, routed_experts=routed))
    return made


def rank(number: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=number, world_size=args.ranks)
    comm = TorchComm()
    samples = make(args) if number == 0 else []
    comm.agree(None)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before, began = memory("VmRSS"), time.perf_counter()
    found = to_all(comm, lambda: samples)
    shared_s = time.perf_counter() - began
    own = found[number :: args.ranks]
    del found
    batches = [batching.collate(own[start : start + 2], 8) for start in range(0, len(own), 2)]
    batched_s = time.perf_counter() - began - shared_s
    total = sum(
        int(batch.routed_experts.sum(dtype=torch.int64)) for batch in batches if batch.routed_experts is not None
    )
    row = {"share_s": shared_s, "batch_s": batched_s, "peak_mb": (memory("VmHWM") - before) / 1e6, "sum": total}
    if number == 0:
        print(json.dumps({name: value for name, value in vars(args).items() if name != "port"}))
    for found in comm.gather({name: round(value, 2) for name, value in row.items()}):
        if number == 0:
            print(json.dumps(found))
    dist.destroy_process_group()


def memory(name: str) -> int:
    """Bytes, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"samples": 64, "tokens": 1024, "layers": 48, "top-k": 8, "ranks": 2, "port": 29611}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.multiprocessing.spawn(rank, (args,), nprocs=args.ranks)


if __name__ == "__main__":
    main()
