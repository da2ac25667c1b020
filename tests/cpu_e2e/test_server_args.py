"""What SGLang's own ServerArgs make of our arguments for a GPU. They are resolved without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sglang.engine.options import server_args_fields

ROOT = Path(__file__).parents[2]

CODE = """
import json
from sglang.srt.server_args import ServerArgs
from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.options import server_args

shown = "attention_backend moe_runner_backend disable_cuda_graph enable_memory_saver"
shown += " flashinfer_allreduce_fusion_backend"
extras = {"ours": {}, "triton": {"attention_backend": "triton"}, "eager": {"disable_cuda_graph": True}}
found = {}
for name, extra in extras.items():
    options = EngineOptions("examples/qwen3_30b_a3b", tp_size=8, device="cuda", extra=extra)
    resolved = ServerArgs(**server_args(options, 30000))
    found[name] = {field: getattr(resolved, field) for field in shown.split()}
print("found", json.dumps(found))
"""


@pytest.mark.skipif(not server_args_fields(), reason="SGLang is not installed")
def test_sglang_keeps_what_we_chose_for_a_gpu() -> None:
    """SGLang rewrites its arguments by model and device; each of these undone is minutes of compiling at the start, or
    weights in another order than an update writes them."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found")).split(" ", 1)[1])
    ours = {
        "attention_backend": "fa3",
        "moe_runner_backend": "triton",
        "disable_cuda_graph": False,
        "enable_memory_saver": True,
        "flashinfer_allreduce_fusion_backend": None,
    }
    assert found["ours"] == ours
    assert found["triton"] == ours | {"attention_backend": "triton"}
    assert found["eager"] == ours | {"disable_cuda_graph": True}
