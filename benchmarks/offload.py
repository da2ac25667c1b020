"""Shared mode's two halves on one GPU, without Megatron and SGLang: `python benchmarks/offload.py [--gib 40]`.

Times `training/offload.py` on frozen weights of that size with adapters and their Adam state, and proves that the bytes
are the same afterwards, that every tensor is the object it was, and that another process can have the memory meanwhile.
Then sends deliveries over `engine/line.py` to another process by CUDA IPC and compares their digests. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_sglang.digests import digest
from megatron_sglang.engine import line
from megatron_sglang.training.offload import Offload

GIB = 1 << 30


class Stack(torch.nn.Module):
    """Frozen bf16 layers of 256 MiB, each with a pair of trained factors that are views of one buffer, as in DDP."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        side = 11585
        self.flat = torch.randn(layers * 2 * 16 * side, device="cuda")
        self.gradients = torch.zeros_like(self.flat)
        for index in range(layers):
            weight = torch.empty(side, side, dtype=torch.bfloat16, device="cuda").normal_()
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight, requires_grad=False))
            pair = self.flat[index * 32 * side : (index + 1) * 32 * side].view(2, 16, side)
            for name, view in zip("ab", pair, strict=True):
                self.register_parameter(f"{name}{index}", torch.nn.Parameter(view))


def offload(gib: int) -> dict[str, Any]:
    module = Stack(layers=gib * 4)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    buffers = [SimpleNamespace(param_data=module.flat, grad_data=module.gradients)]
    chunk = SimpleNamespace(module=module, buffers=buffers, expert_parallel_buffers=[])
    mover = Offload([chunk], SimpleNamespace(optimizer=adam))
    before = {name: digest(parameter.data) for name, parameter in module.named_parameters()}
    identities = [id(parameter) for parameter in module.parameters()]
    total = torch.cuda.mem_get_info()[1]
    free = torch.cuda.mem_get_info()[0]
    seconds: dict[str, list[float]] = {"out": [], "back": []}
    for _ in range(3):  # the first one pins the host's memory
        began = time.perf_counter()
        moved = mover.out()
        seconds["out"].append(time.perf_counter() - began)
        freed = torch.cuda.mem_get_info()[0]
        other = _other_process(int(0.9 * freed))
        began = time.perf_counter()
        mover.back()
        seconds["back"].append(time.perf_counter() - began)
    after = {name: digest(parameter.data) for name, parameter in module.named_parameters()}
    adam.step()
    assert after == before, "bytes changed on their way"
    assert identities == [id(parameter) for parameter in module.parameters()]
    assert trained[0].data_ptr() == module.flat.data_ptr(), "views stay views"
    return {
        "moved_gib": moved / GIB,
        "device_gib": total / GIB,
        "free_gib": {"with the trainer": free / GIB, "while it is out": freed / GIB},
        "another_process_had_gib_meanwhile": other / GIB,
        "seconds": seconds,
        "gb_per_s": {name: moved / 1e9 / min(times) for name, times in seconds.items()},
    }


def _other_process(size: int) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_take, (size,))


def _take(size: int) -> int:
    taken = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    return taken.numel()


def deliveries(count: int = 6, mib: int = 512) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        call = {"id": 1, "version": 1, "folder": folder, "timeout_s": 120.0}
        buffers = [torch.empty(mib << 18, device="cuda") for _ in range(2)]
        results = context.Queue()
        with line.Line(call, 0) as end:
            child = context.Process(target=_receive, args=(call, results))
            child.start()
            began, sent = 0.0, []
            for index in range(count):
                if index >= 2:
                    end.wait(index - 2)
                buffers[index % 2].normal_()
                sent.append(digest(buffers[index % 2]))
                torch.cuda.synchronize()
                header = {"index": index, "dtype": "float32", "lengths": [], "digests": []}
                end.send(header, index % 2, buffers[index % 2], buffers[index % 2])
                began = began or time.perf_counter()  # the first one waits for the other's CUDA context
            end.finish()
            took = time.perf_counter() - began
        got = results.get(timeout=60)
        child.join(60)
    assert got == sent, "what arrived is not what was sent"
    return {"deliveries": count, "mib_each": mib, "digests_equal": True, "seconds": took}


def _receive(call: dict[str, Any], results: Any) -> None:
    found: list[int] = []
    device = torch.device("cuda", 0)
    line.receive({**call, "rank": 0}, device, lambda _, data: found.append(digest(data.view(torch.float32))))
    results.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=40)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"line": deliveries(), "offload": offload(args.gib)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
