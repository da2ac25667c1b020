"""What the ranks of test_convert_*.py do: save a model with random adapters, convert, and look at what came of it."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch

from megatron_sglang import cli, weights
from megatron_sglang.checkpoint_folder import folder_of, write_state
from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.hf_files import tensor_shapes
from megatron_sglang.training import checkpoint
from megatron_sglang.weights import convert as converter
from megatron_sglang.weights import shard_folder, standalone

M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def tokens() -> torch.Tensor:
    return torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(5))


def save(hf: str, folder: str, layout: dict[str, int], lora: dict[str, Any]) -> None:
    """Save a model with random adapters as a run does, at iteration 3."""
    from megatron.training import checkpointing, get_args

    config = LoraConfig(**lora)
    with standalone.adapted_model(Path(hf), config, "float32", layout, base=False) as model:
        cases.randomize(model.chunks, 0.2)
        args = get_args()
        args.save, args.no_save_optim = folder, True
        state = {"lora": {"rank": config.rank, "alpha": config.alpha, "targets": config.targets}, "dtype": "float32"}
        model.comm.from_leader(lambda: write_state(folder_of(folder, 3), state))
        checkpoint.write_in_process()
        checkpointing.save_checkpoint(3, model.chunks, None, None, 0)


def logits(hf: str, load: str, layout: dict[str, int], output: str) -> None:
    """Write the logits [2, 16, vocabulary] of Megatron's own model with the adapters of a checkpoint."""
    stored = standalone.find_checkpoint(Path(load), None)
    with standalone.adapted_model(Path(hf), stored.lora, stored.dtype, layout, base=True) as model:
        standalone.load_adapters(model, stored.folder)
        found = cases.logits(model.chunks, tokens())
        if found is not None:
            torch.save(found, output)


def convert(calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run conversions one after the other; what they return, or an error's text."""
    done: list[Any] = []
    for name, arguments in calls:
        try:
            result = getattr(weights, name)(**arguments)
        except MegatronSglangError as error:
            done.append(f"{type(error).__name__}: {error}")
        else:
            done.append([result.rank, result.alpha, result.targets] if isinstance(result, LoraConfig) else result)
    return done


def command(argv: list[str]) -> int:
    """The command line without torchrun."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[name]
    return cli.main(argv)


def dies(doing: str, at: str, **arguments: Any) -> None:
    """`export_merged`; killed before it can do that to a file called `at`: "open" (in Python), "os.rename"."""

    def kill(event: str, found: tuple[Any, ...]) -> None:
        if event == doing and str(found[0]).endswith(f"/{at}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    weights.export_merged(**arguments)


def growths(
    hf: str, load: str, output: str, layout: dict[str, int], shard_bytes: int, bucket_bytes: int
) -> tuple[int, int]:
    """By how many bytes this process grows beyond the model while merged weights, and then adapters, are written."""
    stored = standalone.find_checkpoint(Path(load), None)
    with standalone.adapted_model(Path(hf), stored.lora, stored.dtype, layout, base=True) as model:
        standalone.load_adapters(model, stored.folder)
        expected, merged = tensor_shapes(hf), 0
        for name in ("warm", "merged"):  # the first one loads code
            new = Path(output, name)
            with converter._of_leader(model, lambda new=new: shard_folder.continued(new, {}, shard_bytes)) as folder:
                work = functools.partial(converter.write_merged, model, expected, stored.dtype, folder, bucket_bytes)
                merged = growth(work)
            del folder, work
        with converter._new_folder(model, Path(output, "adapter")) as path:
            adapter = growth(lambda: converter.write_adapter(model, stored, path, base=hf))
    return merged, adapter


def growth(work: Callable[[], object]) -> int:
    """The highest resident size of this process during `work`, less that before, in bytes."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # a tensor that is freed leaves this process at once
    libc.malloc_trim(0)  # memory that was freed before, but kept, would hide what `work` takes
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the highest size so far, to the present one
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024
