"""The layouts of an engine that is not there: no GPU, no weights, no other ranks.

A child process imports SGLang once and forks. Each fork takes itself for one rank of the engine, by torch's fake
process group whose collectives do nothing, builds SGLang's own model on meta parameters, and traces its loader
(`trace_loader.py`). So the answer is SGLang's, not a copy of its rules.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sglang.engine.options import EngineOptions, server_args
from megatron_sglang.errors import EngineError, SetupError
from megatron_sglang.layout import RankLayout

CPU_BRANCHES = ("linear", "parameter", "vocab_parallel_embedding", "moe.fused_moe_triton.layer")
"""Modules of sglang.srt.layers whose loaders ask `_is_cpu`."""

_PORT = 31500
"""ServerArgs wants one; nothing listens."""


def trace_ranks(options: EngineOptions, shapes: Mapping[str, tuple[int, ...]]) -> list[RankLayout]:
    """One layout for each rank of an engine of `options` on a GPU host, in rank order. shapes: of all HF tensors.

    Takes SGLang's import (15 s) and, for 19,000 tensors, 6 CPU seconds a rank on as many cores as there are.
    Raises `EngineError` with SGLang's last words where it cannot build the model.
    """
    if importlib.util.find_spec("sglang") is None:
        raise SetupError("the engine's layout comes from SGLang's own code, which is not installed; run `make install`")
    with tempfile.TemporaryDirectory(prefix="megatron_sglang_plan_") as name:
        folder = Path(name)
        arguments = server_args(options, _PORT)
        (folder / "order.json").write_text(json.dumps({"server_args": arguments, "shapes": dict(shapes)}))
        _run_child(options, folder)
        return [RankLayout.from_json((folder / f"{rank}.json").read_text()) for rank in range(options.tp_size)]


def as_on_gpu(gpu: bool) -> None:
    """Let SGLang's loaders take the branches of a GPU (True) or of a CPU, in this process."""
    for name in CPU_BRANCHES:
        importlib.import_module(f"sglang.srt.layers.{name}")._is_cpu = not gpu  # pyright: ignore[reportAttributeAccessIssue]


def _run_child(options: EngineOptions, folder: Path) -> None:
    from megatron_sglang.cpu import sglang_server as cpu

    environment = os.environ | cpu.environment(options.tp_size, os.cpu_count() or 1)
    command = [options.python, "-W", "ignore", "-m", __spec__.name, str(folder)]
    log = folder / "log"
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    what = f"layout of {options.model_path} for engine TP {options.tp_size}, EP {options.ep_size}"
    try:
        status = child.wait(options.start_timeout_s)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{what}: no answer after {options.start_timeout_s:.0f} s; run it where more cores are free"
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if status:
        failures = sorted(folder.glob("*.error"))
        words = (failures[0] if failures else log).read_text().strip().splitlines()
        raise EngineError(
            f"{what}: SGLang's model cannot be built or traced: {words[-1] if words else f'status {status}'}; choose "
            "sizes that divide the model's heads and experts, or a model that SGLang knows"
        )


def main(folder: Path) -> int:
    """In the child: fork one process for each rank, as many at a time as there are cores; 1 if one failed."""
    order = json.loads((folder / "order.json").read_text())
    arguments = order["server_args"]
    from megatron_sglang.cpu import sglang_server as cpu

    cpu.install(arguments["model_path"], seeded_sampling=False)
    from sglang.srt.server_args import ServerArgs

    parsed = ServerArgs(**arguments)
    _import_for_ranks()
    waiting, running, failed = list(range(arguments["tp_size"])), set[int](), False
    while (waiting and not failed) or running:
        if waiting and not failed and len(running) < len(os.sched_getaffinity(0)):
            rank = waiting.pop(0)
            running.add(os.fork() or _be_rank(rank, parsed, order["shapes"], folder))
            continue
        pid, status = os.wait()
        running.discard(pid)
        failed |= status != 0
    return int(failed)


def _import_for_ranks() -> None:
    """What every fork needs, imported once."""
    for name in ("trace_loader", "live_model"):
        importlib.import_module(f"megatron_sglang.engine.{name}")
    importlib.import_module("sglang.srt.model_loader.loader")


def _be_rank(rank: int, arguments: Any, shapes: Mapping[str, list[int]], folder: Path) -> int:
    """In a fork. Never returns."""
    status = 1
    try:
        from megatron_sglang.engine.trace_loader import trace

        model, dtype = meta_model(arguments, rank)
        specs = {name: (tuple(shape), dtype) for name, shape in shapes.items()}
        (folder / f"{rank}.json").write_text(trace(model, specs, rank).to_json())
        status = 0
    except Exception:  # noqa: BLE001  process boundary: the parent reads the file
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def meta_model(arguments: Any, rank: int) -> tuple[Any, Any]:
    """SGLang's model of `arguments` (ServerArgs) as rank `rank` holds it, parameters on meta, and its torch dtype.

    For a process of its own: SGLang's groups and global arguments are set for good.
    """
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(arguments)
    config = ModelConfig.from_server_args(arguments)
    _fake_groups(arguments, config, rank)
    initialize_moe_config(arguments)
    # DeepSeek's rope has no version for CPUs, and holds no parameters.
    factory.get_rope_cpu = lambda *given: factory.get_rope(*given[:8])
    as_on_gpu(True)
    with loader.set_default_torch_dtype(config.dtype), torch.device("meta"):
        return loader._initialize_model(config, LoadConfig(load_format="dummy"), None), config.dtype


def _fake_groups(arguments: Any, config: Any, rank: int) -> None:
    """SGLang's process groups, of which this process is the only member that exists."""
    import torch.distributed as dist
    from sglang.srt.distributed import bootstrap
    from sglang.srt.distributed.device_communicators import shm_broadcast
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=arguments.tp_size)
    # SGLang asks for gloo groups besides, and waits for the others in shared memory.
    new_group = dist.new_group
    dist.new_group = functools.wraps(new_group)(lambda ranks=None, *_, **__: new_group(ranks, backend="fake"))
    queue: Any = shm_broadcast.MessageQueue
    queue.create_from_process_group = staticmethod(lambda *_, **__: None)
    bootstrap._set_all_reduce_flags(server_args=arguments)
    sizes = {"tp_rank": rank, "tp_size": arguments.tp_size, "moe_ep_size": arguments.ep_size}
    ones = dict.fromkeys(("pp_size", "attn_dp_size", "attn_cp_size", "moe_dp_size", "dcp_size"), 1)
    bootstrap._init_parallel_groups(
        backend="fake",
        dist_init_method="",
        server_args=arguments,
        model_config=config,
        gpu_id=0,
        pp_rank=0,
        **sizes,
        **ones,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
