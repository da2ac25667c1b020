"""Enter the CPU room in a trainer process: `enter()` before the first import of Megatron.

Each patch names the place upstream that makes it necessary (megatron-core 0.19.2, megatron-bridge 0.6.2).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megatron_sglang.cpu import exact_matmul, packed_attention, te_import, torch_facade
from megatron_sglang.errors import DataError

# Megatron and Bridge import these when they are installed, and use none of them on a CPU.
_ONLY_FOR_GPUS = ("flashinfer", "fla", "torchao", "tilelang", "tvm", "flash_attn", "cutlass")
# transformers takes a function of the first two, for assisted generation and for losses of object detection; Megatron
# asks whether the timers' writer is wandb (core/timers.py:13). Unlike the others they can be imported again afterwards:
# a user's reward function and the trackers run in this process.
_NOT_NOW = ("scipy", "sklearn", "wandb")

_entered = False


def needed() -> bool:
    return not torch.cuda.is_available()


def enter() -> None:
    """Idempotent, and a no-op where CUDA is there."""
    global _entered
    if _entered or not needed():
        return
    _entered = True
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # core/jit.py: jit_fuser is torch.compile, minutes of C++ on two cores
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # arguments.py:1437 demands it for TP > 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in _ONLY_FOR_GPUS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    # torch warns at import, past any redirection, that it finds nvcc but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _short_imports():
        torch_facade.install()
        exact_matmul.install()
        te_import.install()
        _patch_core()
        _patch_training()


@contextlib.contextmanager
def _short_imports() -> Iterator[None]:
    """Import without collecting garbage, without `_NOT_NOW`, and without the compiler: core/jit.py decorates dozens of
    functions with torch.compile, which imports it even where TORCH_COMPILE_DISABLE leaves them as they are."""
    collecting, torch_compile = gc.isenabled(), torch.compile
    gc.disable()
    torch.compile = _uncompiled
    for name in _NOT_NOW:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        torch.compile = torch_compile
        for name in _NOT_NOW:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
        if collecting:
            gc.enable()


def _uncompiled(function: Any = None, **_options: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


def layer_spec(provider: Any) -> Any:
    """What builds the layers of Bridge's `provider` without Transformer Engine. DataError if nothing does."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    widths = inspect.signature(DotProductAttention.__init__).parameters
    if getattr(provider, "multi_latent_attention", False) and "k_channels" not in widths:
        raise DataError(
            "the model has latent attention (DeepSeek's), which Megatron computes with Transformer Engine only; choose "
            "another model, or a GPU"
        )
    own = provider.transformer_layer_spec
    if isinstance(own, functools.partial) and own.func is get_gpt_decoder_block_spec:  # layers of several kinds, or MLA
        return functools.partial(own.func, **(own.keywords | {"use_transformer_engine": False}))
    return local_layer_spec


def _patch_core() -> None:
    import megatron.bridge.peft.utils as bridge_peft
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # bridge/peft/utils.py:591: without TE its classes are MagicMock *instances*, which isinstance() refuses.
    bridge_peft.HAVE_TE = False

    # tensor_parallel/random.py:118 goes to the CUDA generator directly, past torch.cuda.set_rng_state.
    tp_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # moe_utils.py:1184 converts split sizes to numpy only if they are on a GPU; gloo's all-to-all needs numbers.
    def splits_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = splits_to_numpy

    # moe_layer.py:629 demands sequence parallelism for MoE with TP, torch_norm.py:50 refuses it. All the norm needs is
    # the attribute by which finalize_model_grads sums its gradient over TP.
    def new_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *_args: Any, **_kwargs: Any) -> Any:
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = kinds[config.normalization](normalized_shape=hidden_size, eps=eps)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = new_norm

    # dot_product_attention.py:148 refuses packed sequences.
    DotProductAttention.forward = packed_attention.by_sequence(DotProductAttention.forward)


def _patch_training() -> None:
    import megatron.core.optimizer as core_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    from megatron.training import initialize, training

    from megatron_sglang.cpu.fused_adam import FusedAdam

    # initialize.py:66 asserts a GPU unless told otherwise, and pretrain() does not pass the option on.
    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)

    # initialize.py:352 skips model-parallel set-up where it counts no devices.
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    core_optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_TE_OPTIMIZER = True
