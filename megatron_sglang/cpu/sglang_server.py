"""What SGLang 0.5.17 needs to serve without CUDA. For the engine's server process only: never call it in a trainer.

Each patch names the SGLang line it answers; paths are relative to sglang/srt. Children are forked, so they inherit
all of it along with the imports, which are most of the start time.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_sglang.cpu import exact_matmul
from megatron_sglang.errors import SetupError

if TYPE_CHECKING:
    import torch

STUBS = Path(__file__).parent / "sgl_kernel_stub"

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    # Without it SGLang picks a platform by looking for a GPU (utils/common.py:is_cpu).
    "SGLANG_USE_CPU_ENGINE": "1",
    # torch.compile of the sampler and embedding costs half a minute (layers/vocab_parallel_embedding.py:138).
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    # PyNccl loads the wheel's libnccl and then refuses the cpu device; a missing library switches it off
    # (distributed/device_communicators/pynccl.py:113).
    "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so",
}

UNUSED_PACKAGES = ("flashinfer", "megatron", "scipy", "sklearn", "torchao")
"""Optional for SGLang and transformers, unused here, and together half of the import time."""


def environment(tp_size: int, cores: int) -> dict[str, str]:
    """Of the server process. TP > 1 demands a binding (utils/numa_utils.py:440), though without AMX it is unused."""
    return ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([f"0-{cores - 1}"] * tp_size)}


def install(model_path: str, seeded_sampling: bool) -> None:
    """Prepare this process; imports SGLang. `seeded_sampling`: draw each token from its request's seed and position."""
    if "sglang" in sys.modules or "sgl_kernel" in sys.modules:
        raise SetupError("cpu.sglang_server.install came after SGLang's import; call it first, in the server process")
    sys.path.insert(0, str(STUBS))
    gc.disable()  # a fifth of the import time
    _import_less(Path(model_path))
    _fork_children()
    _tolerate_remote_experts()
    exact_matmul.install()
    _attend_exactly()
    _check_weights()
    _collect_little()
    _pin_nothing()
    if seeded_sampling:
        _sample_by_seed()
    gc.enable()
    gc.freeze()  # see _collect_little


def _import_less(model_path: Path) -> None:
    """Leave out optional packages, and of SGLang's 200 model files (models/registry.py:89) all but the one in use."""
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(UNUSED_PACKAGES))
    package = importlib.util.find_spec("sglang")
    config = model_path / "config.json"
    if package is None or not package.submodule_search_locations or not config.exists():
        return  # SGLang's own error is the better one
    wanted = json.loads(config.read_text()).get("architectures", [])
    files = list(Path(package.submodule_search_locations[0], "srt", "models").glob("*.py"))
    definition = re.compile(rf"^class ({'|'.join(map(re.escape, wanted))})\b", re.MULTILINE)
    defining = [file for file in files if wanted and definition.search(file.read_text())]
    if defining:
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(file.stem for file in files if file not in defining)


def _fork_children() -> None:
    """Start schedulers and detokenizer by fork: SGLang insists on spawn (entrypoints/engine.py:1670), which imports
    everything once more in each of them. So what they need is imported here, once."""
    from sglang.srt.entrypoints import engine
    from sglang.srt.models import registry  # noqa: F401

    fork = multiprocessing.get_context("fork")
    engine.mp = SimpleNamespace(Process=fork.Process, Pipe=fork.Pipe, set_start_method=lambda *_, **__: None)


def _tolerate_remote_experts() -> None:
    """With EP > 1 the ids of experts that other ranks hold are -1, which moe_forward_native counts with scatter_
    and fails (layers/moe/fused_moe_native.py:90)."""
    from sglang.srt.layers.moe import fused_moe_native

    original = fused_moe_native.moe_forward_native

    def moe_forward_native(layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> torch.Tensor:
        tokens, slots = (topk_output.topk_ids >= 0).nonzero(as_tuple=True)
        if len(tokens) == topk_output.topk_ids.numel():
            return original(layer, x, topk_output, config)
        mixed = x.new_zeros(x.shape)
        if len(tokens):
            # Each local (token, expert) pair becomes a token with one expert.
            pairs = topk_output._replace(
                topk_ids=topk_output.topk_ids[tokens, slots, None],
                topk_weights=topk_output.topk_weights[tokens, slots, None],
            )
            mixed.index_add_(0, tokens, original(layer, x[tokens], pairs, config))
        return mixed

    fused_moe_native.moe_forward_native = moe_forward_native


def _attend_exactly() -> None:
    """torch's attention for float32 on CPUs takes exp to 20 bits (ATen, FlashAttentionKernel.cpp: exp_u20) and sums in
    float32; for float64 it does neither. See exact_matmul.py for why."""
    import torch
    from sglang.srt.layers.attention import torch_native_backend

    original = torch_native_backend.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        if query.dtype != torch.float32:
            return original(query, key, value, **options)
        return original(query.double(), key.double(), value.double(), **options).float()

    torch_native_backend.scaled_dot_product_attention = attention


def _check_weights() -> None:
    """/weights_checker waits for the GPU before and after it sums (utils/weight_checker.py:124), which torch refuses
    where there is none."""
    import torch

    torch.cuda.synchronize = lambda *_: None


def _collect_little() -> None:
    """Every flush collects garbage (platforms/cpu.py:95), and an update begins with one: 0.6 s with SGLang's modules in
    the heap, 45 ms with what a scheduler's start leaves there. The first flush takes both out of later ones' way."""
    from sglang.srt.platforms.cpu import CpuDeviceMixin

    frozen: list[bool] = []

    def empty_cache(self: Any) -> None:
        gc.collect()
        if not frozen:
            frozen.append(True)
            gc.freeze()

    CpuDeviceMixin.empty_cache = empty_cache


def _pin_nothing() -> None:
    """LoRA and the buffer of routed experts pin host memory without asking whether there is a driver
    (lora/layers.py:457, lora/backend/torch_backend.py:225, state_capturer/base.py:52). Pinning changes no value."""
    import torch
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend
    from sglang.srt.state_capturer import base

    class Unpinned:
        """torch, but for `pin_memory`."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(torch, name)
            if name not in ("tensor", "zeros", "empty", "arange"):
                return found
            return lambda *args, pin_memory=False, **named: found(*args, **named)

    torch.Tensor.pin_memory = lambda self, *_args: self  # type: ignore[method-assign]
    layers.torch = torch_backend.torch = base.torch = Unpinned()  # type: ignore[assignment]


def _sample_by_seed() -> None:
    """Give every request its own random stream, as --enable-deterministic-inference does on GPUs. That flag itself
    refuses torch_native attention (arg_groups/overrides.py:1981) and installs Triton GEMMs, so only its two
    halves that matter for sampling are switched on: seeds in the batch (sampling/sampling_batch_info.py:89),
    and the hash of (seed, position, token) that a Triton kernel computes (layers/sampler.py:738)."""
    from sglang.srt.layers import sampler
    from sglang.srt.sampling import sampling_batch_info

    get_exec = sampling_batch_info.get_exec
    switched_on = SimpleNamespace(enable_deterministic_inference=True)
    sampling_batch_info.get_exec = lambda: SimpleNamespace(deterministic=switched_on, features=get_exec().features)
    sampler.murmur_hash32 = murmur_hash32


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """SGLang's kernels/ops/sampling/murmur_hash.py in torch: [n], [n], [m] -> [n, m] int64 in [0, 2^32)."""
    import torch

    mask = 0xFFFFFFFF
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    rows = [seed & mask, (seed >> 32) & mask, positions.to(torch.int64) & mask]
    state = torch.zeros_like(rows[0])[:, None]
    for word in [row[:, None] for row in rows] + [columns.to(torch.int64)[None, :] & mask]:
        word = (word * 0xCC9E2D51) & mask
        word = ((word << 15) | (word >> 17)) & mask
        state = state ^ ((word * 0x1B873593) & mask)
        state = ((state << 13) | (state >> 19)) & mask
        state = (state * 5 + 0xE6546B64) & mask
    state = state ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & mask
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & mask
    return state ^ (state >> 16)
