"""What the ranks of test_convert.py do: save a model with random adapters, convert, and look at what was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import torch

from megatron_sglang import weights
from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.training import checkpoint
from megatron_sglang.weights import standalone


def tokens() -> torch.Tensor:
    return torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(5))


def save(hf: str, folder: str, layout: dict[str, int], lora: dict[str, Any] | None = None) -> list[str]:
    """Save a model with random adapters as a run does at iteration 3."""
    from megatron.training import checkpointing, get_args

    config = LoraConfig(**lora or {"rank": 8, "alpha": 16})
    with standalone.adapted_model(Path(hf), config, "float32", layout, base=True) as model:
        cases.randomize(model.chunks, 0.2)
        args = get_args()
        args.save, args.no_save_optim = folder, True
        state = {"lora": {"rank": config.rank, "alpha": config.alpha, "targets": config.targets}, "dtype": "float32"}
        model.comm.from_leader(lambda: checkpoint.write_state(folder, 3, state))
        checkpointing.save_checkpoint(3, model.chunks, None, None, 0)
    return []


def logits(hf: str, load: str, layout: dict[str, int], output: str) -> list[str]:
    """Write the logits of Megatron's own model with the adapters of a checkpoint."""
    stored = standalone.find_checkpoint(Path(load), None)
    with standalone.adapted_model(Path(hf), stored.lora, stored.dtype, layout, base=True) as model:
        standalone.load_adapters(model, stored.folder)
        found = cases.logits(model.chunks, tokens())
        if found is not None:
            torch.save(found, output)
    return []


def convert(calls: list[list[Any]]) -> list[Any]:
    """Run conversions one after the other, [function, arguments] each; what they return, or an error's text."""
    done = []
    for name, arguments in calls:
        try:
            result = getattr(weights, name)(**arguments)
        except MegatronSglangError as error:
            done.append(f"{type(error).__name__}: {error}")
        else:
            done.append(json.loads(json.dumps(result, default=lambda lora: [lora.rank, lora.alpha, lora.targets])))
    return done
