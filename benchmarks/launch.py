"""How the benchmarks that compare whole runs start one, and write what they have found."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 400


def torchrun(ranks: int, *arguments: str, timeout_s: int = TIMEOUT_S) -> list[str]:
    """A command that ends by itself, to be run in `ROOT` with `environment()`: by SIGTERM, which torchrun hands to the
    ranks, and they to what they have started."""
    ended = ("timeout", "--kill-after=30", str(timeout_s))
    return [*ended, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            *arguments]  # fmt: skip


def environment() -> dict[str, str]:
    """This one, where nothing need be installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}


def random_model(layers: int, folder: Path) -> tuple[str, str]:
    """Arguments for Qwen3-30B-A3B's shape with fewer layers and random weights; made in `folder`, with the tokenizer of
    examples/tiny_fim."""
    config = json.loads((ROOT / "examples/qwen3_30b_a3b/config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tiny_fim/model" / name, folder)
    return f"model.hf_path={folder}", "model.random_weights=true"


def write(script: str, found: Mapping[str, Any], output: Path | None) -> None:
    """Print it as JSON with the command that made it, and to `output` where that is given."""
    command = f"benchmarks/{script} " + " ".join(sys.argv[1:]).partition("--output")[0]
    text = json.dumps({"command": command, **found}, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")
