"""Make `megatron.bridge` importable without Transformer Engine.

Transformer Engine cannot be imported on a machine without libcuda. megatron.bridge 0.6.2 needs it in one place,
peft/lora_layers.py:20 (`import transformer_engine.pytorch as te`, for TEFusedLoRALinear alone). An import hook
wraps the loader of that one module: while its body runs, a throw-away `transformer_engine` is in sys.modules, and
right after it is gone. So nobody else (megatron.core's HAVE_TE, get_te_version) ever sees a fake.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

_TARGET = "megatron.bridge.peft.lora_layers"
_ITS_IMPORTS = (
    "megatron.core.transformer.moe.moe_utils",
    "megatron.bridge.peft.adapter_wrapper",
    "megatron.bridge.peft.lora_merge",
)


class _Absent:
    """A class without instances, so that `isinstance(x, te.Linear)` is False for every x."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Transformer Engine is not installed; this layer needs it")


def _stand_in() -> dict[str, types.ModuleType]:
    root, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    root.__path__ = []
    members = {
        "Linear": type("Linear", (_Absent,), {}),
        "LayerNormLinear": type("LayerNormLinear", (_Absent,), {}),
        "ops": types.SimpleNamespace(Sequential=_Absent),
    }
    vars(pytorch).update(members)
    vars(root).update(pytorch=pytorch)
    return {root.__name__: root, pytorch.__name__: pytorch}


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        for name in _ITS_IMPORTS:  # first, so that they do not run while the stand-in is visible
            importlib.import_module(name)
        stand_in = _stand_in()
        sys.modules.update(stand_in)
        try:
            self.inner.exec_module(module)
        finally:
            for name in stand_in:
                sys.modules.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Idempotent. Does nothing where Transformer Engine is installed or the module is already there."""
    present = importlib.util.find_spec("transformer_engine") is not None or _TARGET in sys.modules
    if not present and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
