"""What is done to a live model around loading weights: poison them before, find out whether a trace left them alone,
and fill afterwards what follows from them (tied heads, derived state, kept casts). Torch only; used inside engine
ranks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megatron_sglang.digests import digest, has_nan

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def is_tied(model: Any) -> bool:
    """Does the model tie its head to its embedding by configuration but not by memory? SGLang's MoE models ignore
    tie_word_embeddings (models/qwen3_moe.py:958) and would keep a random head. Both are sharded alike."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and {HEAD, EMBEDDING} <= {name for name, _ in model.named_parameters()}


@torch.no_grad()
def tie_head(model: Any, parameters: Mapping[str, torch.Tensor] | None = None) -> None:
    """Copy the embedding into the head of such a model. parameters: all of them, where they have been found already."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied:
        return
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    if {HEAD, EMBEDDING} <= parameters.keys():
        parameters[HEAD].copy_(parameters[EMBEDDING])


def refresh(model: torch.nn.Module) -> None:
    """Compute anew what follows from the parameters: derived state, kept casts."""
    derive(model)
    recast(model)


def derive(model: Any) -> bool:
    """Run the model's own hook for what it derives from its parameters (DeepSeek's w_kc and w_vc); it may replace them.
    False if the model has no such hook."""
    hook = getattr(model, "post_load_weights", None)
    if not callable(hook):
        return False
    hook()
    return True


def casts(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(cast, weight) of casts that SGLang takes at the first forward and keeps: GLM4-MoE's routers in fp32
    (models/glm4_moe.py:380)."""
    modules: Any = model.modules() if isinstance(model, torch.nn.Module) else ()
    # In `_buffers`, because getattr takes ten times as long for a name that a module does not have.
    found = ((module._buffers.get("_weight_fp32"), module) for module in modules)
    return [(kept, module.weight) for kept, module in found if kept is not None]


@torch.no_grad()
def recast(model: Any, found: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
    """Make those casts again: SGLang never does, and would go on with those of the first weights. In place, since CUDA
    graphs hold the address. found: what `casts` gave, if it was called after the last forward."""
    for kept, weight in casts(model) if found is None else found:
        kept.copy_(weight)


def floating(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters whose dtype has a NaN."""
    return [(name, parameter.data) for name, parameter in model.named_parameters() if has_nan(parameter)]


@torch.no_grad()
def poison(model: Any) -> None:
    """Fill every floating parameter with NaN, so that what is not written afterwards is noticed."""
    for _, parameter in floating(model):
        parameter.fill_(torch.nan)


def fingerprints(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """(storage, offset, shape, strides, dtype, digest) of every parameter and buffer; no digest for meta tensors."""
    found = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        geometry = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        found[name] = (
            tensor.untyped_storage()._cdata, *geometry, None if tensor.is_meta else digest(tensor),
        )  # fmt: skip
    return found


@contextlib.contextmanager
def own_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards every module has the parameter objects it had before."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.clear()
            module._parameters.update(parameters)


@contextlib.contextmanager
def threads_inline() -> Iterator[None]:
    """Jobs that this thread gives to a ThreadPoolExecutor run at once: torch's modes do not follow into threads."""
    original, owner = concurrent.futures.ThreadPoolExecutor.submit, threading.get_ident()

    def submit(self: Any, function: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        if threading.get_ident() != owner:
            return original(self, function, *args, **kwargs)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  a job's error belongs to whoever asks for its result
            future.set_exception(error)
        return future

    concurrent.futures.ThreadPoolExecutor.submit = submit
    try:
        yield
    finally:
        concurrent.futures.ThreadPoolExecutor.submit = original
