"""What the import of Megatron leaves in a rank."""

from __future__ import annotations

import gc
import importlib.util
import sys

import cases  # noqa: F401  (enters the CPU room)
import torch


def after_imports() -> dict[str, object]:
    """Packages loaded although nobody uses them, whether a user's code still finds them, and whether garbage is
    collected."""
    heavy = ("sklearn", "scipy", "pandas", "torchao", "wandb", "torch._inductor.compile_fx")
    return {
        "loaded": [name for name in heavy if sys.modules.get(name) is not None],
        "assisted generation": "transformers.generation.candidate_generator" in sys.modules,
        "found": importlib.util.find_spec("sklearn") is not None and importlib.util.find_spec("wandb") is not None,
        "compiler": torch.compile.__module__,
        "collecting": gc.isenabled(),
    }
