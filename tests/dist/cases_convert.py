"""What the ranks of test_convert.py do: save a model with random adapters, convert, and look at what was loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cases
import torch

from megatron_sglang import cli, weights
from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.training import checkpoint
from megatron_sglang.weights import standalone


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
        model.comm.from_leader(lambda: checkpoint.write_state(folder, 3, state))
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
