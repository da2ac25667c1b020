"""The engine room: a rollout engine in its own process tree, spoken to over HTTP.

    with create_engine(EngineOptions(model_path="examples/tiny_fim/model", tp_size=2)) as engine:
        engine.begin_update(1)
        engine.load(bucket)
        engine.commit_update(1, buckets=1)
        completions = engine.generate(requests)

Importing this package imports nothing heavy, not even torch: the engine's supervisor process runs from here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sglang.engine.options import EngineOptions

if TYPE_CHECKING:
    from megatron_sglang.engine.group import EngineGroup
    from megatron_sglang.engine.http_engine import HttpEngine

__all__ = ["EngineOptions", "create_engine", "create_engines"]


def create_engine(options: EngineOptions) -> HttpEngine:
    """An engine that is not started yet: `start()` spawns it, `wait_ready()` blocks; `with` does both."""
    from megatron_sglang.engine.http_engine import HttpEngine

    return HttpEngine(options)


def create_engines(options: EngineOptions, count: int) -> HttpEngine | EngineGroup:
    """`count` engines of `options`, next to each other on the devices, as one; a single one is `create_engine`'s."""
    from megatron_sglang.engine.group import EngineGroup, spread

    return create_engine(options) if count == 1 else EngineGroup(spread(options, count))
