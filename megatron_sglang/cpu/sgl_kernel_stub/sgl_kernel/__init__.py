"""Stand-in for the `sgl_kernel` wheel where there is no CUDA: it imports, and every function of it raises when called.

SGLang imports sgl_kernel unconditionally on the CPU (kernels/ops/kvcache/cache_move.py:10), but without AMX never
calls into it; should it do so after all, the error names the kernel instead of computing something else.
"""

from typing import Any

__version__ = "0.0.0+cpu"
__path__: list[str] = []


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} needs CUDA and was called on a machine without it")

    return kernel
