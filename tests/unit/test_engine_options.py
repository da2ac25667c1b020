"""Engine options and the environment an engine inherits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.options import (
    MOVES_WEIGHTS,
    OWNED,
    cuda_defaults,
    has_fa3,
    server_args,
    server_args_fields,
)
from megatron_sglang.engine.server import clean_environment
from megatron_sglang.errors import ConfigError


def test_extra_reaches_sglang_and_owned_names_do_not() -> None:
    """A passed-through key or port would silently undo what the engine room guarantees."""
    options = EngineOptions("m", device="cpu", tp_size=2, extra={"log_level": "info", "page_size": 1})
    arguments = server_args(options, port=1234)
    assert (arguments["log_level"], arguments["page_size"], arguments["port"]) == ("info", 1, 1234)
    for name in OWNED:
        with pytest.raises(ConfigError, match=f"sets '{name}', which this package owns; use "):
            EngineOptions("m", extra={name: 1})


@pytest.mark.skipif(not server_args_fields(), reason="SGLang is not installed")
def test_unknown_name_is_refused_with_a_suggestion() -> None:
    """SGLang would only fail a minute later, in another process."""
    with pytest.raises(ConfigError, match="did you mean 'chunked_prefill_size'"):
        EngineOptions("m", extra={"chunk_prefill_size": 1})
    ours = server_args(EngineOptions("m", device="cuda"), 1) | server_args(EngineOptions("m", device="cpu"), 1)
    assert ours.keys() | OWNED.keys() <= server_args_fields()


@pytest.mark.skipif(not server_args_fields(), reason="SGLang is not installed")
def test_what_would_move_weights_after_loading_is_refused() -> None:
    """Digests of what was sent and of what lies there would agree, and the model computes something else."""
    assert server_args_fields() >= MOVES_WEIGHTS.keys()
    for name in MOVES_WEIGHTS:
        with pytest.raises(ConfigError, match=f"{name}='fp8'.*not be what was proved"):
            EngineOptions("m", extra={name: "fp8"})
    harmless = {"quantization": None, "enable_eplb": False, "cpu_offload_gb": 0, "offload_group_size": -1}
    given = server_args(EngineOptions("m", device="cuda", extra=harmless | {"moe_runner_backend": "auto"}), 1)
    assert given["moe_runner_backend"] == "triton", "SGLang would choose another one"


@pytest.mark.parametrize(
    ("changes", "message"), [({"tp_size": 0}, "tp_size=0"), ({"tp_size": 2, "ep_size": 3}, "ep_size=3")]
)
def test_impossible_sizes(changes: dict[str, int], message: str) -> None:
    """They would surface as an assertion deep in SGLang."""
    with pytest.raises(ConfigError, match=message):
        EngineOptions("m", **changes)  # pyright: ignore[reportArgumentType]


def test_environment_is_cleaned() -> None:
    """torchrun's variables make SGLang join the wrong process group; expandable segments break CUDA IPC, and
    what is rounded for the trainer would cost an engine a part of its KV cache."""
    dirty = {
        "PATH": "/bin",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "TORCHELASTIC_RUN_ID": "x",
        "GROUP_RANK": "0",
        "ROLE_NAME": "x",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,roundup_power2_divisions:16",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True",
    }
    assert clean_environment(dirty) == {"PATH": "/bin", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}


def test_import_is_light() -> None:
    """The supervisor imports this package too: torch or SGLang in it would cost seconds and memory per engine."""
    code = "import sys, megatron_sglang.engine.launch; print(sorted({'torch', 'sglang', 'httpx'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_attention_is_what_the_environment_has(tmp_path: Path) -> None:
    """SGLang takes FlashAttention 3 on Hopper whether its kernels are installed or not, and dies without them."""
    assert not has_fa3(tmp_path)
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel/flash_ops.abi3.so").touch()
    assert has_fa3(tmp_path)
    assert "attention_backend" not in cuda_defaults(True, fa3=True)
    assert cuda_defaults(True, fa3=False)["attention_backend"] == "triton"
    # What another interpreter has is not known here.
    elsewhere = EngineOptions("m", device="cuda", python="/other/bin/python")
    assert "attention_backend" not in server_args(elsewhere, 1)


def test_each_default_of_a_gpu_can_be_overridden() -> None:
    """They answer traps of one SGLang on one kind of GPU; another host may know better."""
    for name, given in cuda_defaults(True, fa3=False).items():
        if name not in OWNED | MOVES_WEIGHTS:
            other = "flashinfer" if isinstance(given, str) else not given
            assert server_args(EngineOptions("m", device="cuda", extra={name: other}), 1)[name] == other
