"""For Megatron's sake, "cuda" means the CPU in this process.

Megatron says "cuda" in some seventy places that no option reaches (schedules.py:749, optimizer.py:315,
clip_grads.py:108, ...). Three mechanisms answer them:

1. functions of `torch.cuda` that Megatron calls unconditionally get a CPU meaning; `is_available()` stays False;
2. a TorchFunctionMode turns device="cuda", .cuda() and .to("cuda") into the CPU. It sees only the calls of this
   thread, and CPU autograd runs in the caller's thread. torch.empty and its kind are *not* replaced: that would
   defeat `with torch.device("meta")` and leave rotary tables of HF models uninitialised, without an error;
3. torch.distributed: "nccl" becomes "gloo", coalesced collectives run one by one.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import time
import types
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


class _Event:
    """torch.cuda.Event that knows the time and nothing else."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        self.record()

    def record(self, *_args: object) -> None:
        self.time = time.perf_counter()

    def wait(self, *_args: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


class _Stream:
    """torch.cuda.Stream on a device that works in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, *_args: object) -> None: ...

    def wait_event(self, *_args: object) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_args: object) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


_CUDA_TYPE = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer.py:401, clip_grads.py:174 and others sort tensors by the name "torch.cuda.FloatTensor"
            name = func(*args)
            asked_by_megatron = "/megatron/" in sys._getframe(1).f_code.co_filename
            return _CUDA_TYPE.get(name, name) if asked_by_megatron else name
        return func(*args, **(kwargs or {}))


def install() -> None:
    """Idempotent; refuses nothing, so call it only where `torch.cuda.is_available()` is False."""
    global _mode
    if _mode is not None:
        return
    _patch_cuda_functions()
    _patch_distributed()
    mode = _mode = _CudaIsCpu()
    mode.__enter__()


def _patch_cuda_functions() -> None:
    stream = _Stream()

    def always(value: Any) -> Any:  # a function of its own for each name: dynamo's tables go by identity
        return lambda *_args, **_kwargs: value

    def get_rng_state(device: object = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = "cuda") -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    properties = types.SimpleNamespace(total_memory=1 << 33, major=0, minor=0, name="cpu", multi_processor_count=1)
    replacements: dict[str, Any] = {
        "current_device": always(CPU),
        "current_stream": always(stream),
        "default_stream": always(stream),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "Stream": _Stream,
        "Event": _Event,
        "is_initialized": always(True),
        "is_current_stream_capturing": always(False),
        "manual_seed": manual_seed,
        "manual_seed_all": lambda seed: manual_seed(seed),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "memory_stats": lambda *_a, **_k: collections.defaultdict(int),
        "mem_get_info": always((1 << 33, 1 << 33)),
        "get_device_capability": always((0, 0)),
        "get_device_properties": always(properties),
        "get_device_name": always("cpu"),
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        replacements[name] = always(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = always(0)
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.random.set_rng_state = set_rng_state
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = always(None), always(None)
    torch.Tensor.record_stream = always(None)
    torch.nn.Module.cuda = lambda self, device=None: self


def _patch_distributed() -> None:
    original_init, original_group, original_barrier = (
        distributed_c10d.init_process_group,
        distributed_c10d.new_group,
        distributed_c10d.barrier,
    )

    def gloo(backend: object) -> Any:
        return "gloo" if backend is not None and "nccl" in str(backend) else backend

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        original_init(gloo(backend), *args, **kwargs)

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **kwargs: Any
    ) -> Any:
        kwargs.pop("device_id", None)
        return original_group(ranks, timeout, gloo(backend), None, **kwargs)

    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return original_barrier(group, async_op)

    class Coalesced:
        """Collectives inside ran one by one, so there is nothing left to wait for."""

        def wait(self) -> None: ...

    @contextlib.contextmanager
    def coalescing_manager(*_args: Any, **_kwargs: Any) -> Any:
        yield Coalesced()

    modules: tuple[Any, ...] = (torch.distributed, distributed_c10d)
    for module in modules:
        module.init_process_group = init_process_group
        module.new_group = new_group
        module.barrier = barrier
        module._coalescing_manager = coalescing_manager
