"""What the mode of a run (`placement.choose_mode`) means for its parts: engines, paths, cycle and plugin.

Every rank comes to the same answers, so the nodes of a run must be alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sglang import placement
from megatron_sglang.config import RunConfig
from megatron_sglang.config_check import ROUTER
from megatron_sglang.engine import EngineOptions, create_engines
from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.lora_options import lora_server_args
from megatron_sglang.errors import ConfigError
from megatron_sglang.placement import Choice


def trainer_ranks() -> int:
    """How many ranks the trainer has on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def devices() -> int:
    """Visible CUDA devices; 0: a CPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose(config: RunConfig) -> Choice:
    """The mode of this run, and why."""
    found = devices()
    choice = placement.choose_mode(
        config.rollout.mode,
        devices=found,
        trainer_ranks=trainer_ranks(),
        external=config.engine.external,
        fits=_fits(config) if found == 1 else None,
    )
    check_method(choice.mode, config.sync.method, choice.why)
    return choice


def _fits(config: RunConfig) -> bool | None:
    import torch

    sizes = [path.stat().st_size for path in Path(config.model.hf_path).glob("*.safetensors")]
    share = config.sglang.get("mem_fraction_static", EngineOptions.__dataclass_fields__["mem_fraction"].default)
    return placement.both_fit(sum(sizes), torch.cuda.mem_get_info()[1], float(share)) if sizes else None


def engines_of(config: RunConfig) -> list[range]:
    """For each engine that the run starts its ranks, counted through all of them; `config.engine.tp_size` is
    resolved."""
    return placement.engines_in(
        choose(config).mode, devices=devices(), trainer_ranks=trainer_ranks(), tp_size=config.engine.tp_size or 1
    )


def create(config: RunConfig, options: EngineOptions, show: Callable[[str], None]) -> Any:
    """The run's engines, as one, behind a router if that is asked for; not started yet. Says which mode, and why."""
    choice = choose(config)
    show(f"rollout mode: {choice.mode}, because {choice.why}")
    if choice.mode == "external":
        from megatron_sglang.engine.external import connect

        engine: Any = connect(options, config.engine.external)
    else:
        engine = create_engines(options, len(engines_of(config)))
    if policy := config.sglang.get(ROUTER):
        show(f"router: {route(engine, policy, Path(config.log.run_dir, 'router.log'))}")
    elif len(members(engine)) > 1:
        show(
            "router: none, because our own client keeps a session at one engine without a further hop; "
            "--sglang-router-policy puts sglang-router in front"
        )
    return engine


def route(engine: Any, policy: Any, log_path: Path) -> str:
    """Put sglang-router before several engines, and say so; or why it is our own client that chooses."""
    from megatron_sglang.engine import router

    count = len(members(engine))
    if count == 1:
        return "there is one engine, so nothing to choose"
    if not router.is_installed():
        return (
            f"sglang-router is not installed (megatron-sglang[router]), so {ROUTER}={policy} has no effect: our own "
            "client keeps a session at one engine, new ones go where least runs"
        )
    engine.router = router.Router(engine, policy=policy, log_path=str(log_path))
    return f"sglang-router, {policy}, in front of {count} engines; each completion is a request of its own"


def check_method(mode: placement.Mode, method: str, why: str = "") -> None:
    """Raises `ConfigError` for a sync method that the mode cannot have. why: the mode was chosen."""
    if mode == "shared" and method not in ("auto", "generic"):
        raise ConfigError(
            f"sync.method={method} in shared mode{f' ({why})' if why else ''}, where weights go through the host by "
            "the generic path; leave it out"
        )
    if mode == "colocated" and method == "broadcast" and devices():
        raise ConfigError(
            "sync.method=broadcast in colocated mode: NCCL makes no group of two processes on one GPU; leave it out, "
            "or use --rollout-mode split"
        )
    if mode == "external" and method == "restart":
        raise ConfigError("sync.method=restart ends and starts engines, and external ones are not ours; choose another")


def extra_of(config: RunConfig) -> dict[str, Any]:
    """SGLang's options that follow from the mode; the user's own win."""
    first = placement.first_device(choose(config).mode, devices=devices(), trainer_ranks=trainer_ranks())
    return {"base_gpu_id": first} if first else {}


def lora_of(config: RunConfig) -> dict[str, Any]:
    """SGLang's options for serving the adapters themselves. `ConfigError` where it cannot."""
    if config.sync.method != "adapter" or config.rollout.engine == "fake":
        return {}
    return lora_server_args(config.lora, config.model.hf_path, "cuda" if devices() else "cpu", config.sglang)


def wait_ready(engine: Any, show: Callable[[str], None]) -> None:
    """Block until the engine answers; says what will not be proved of its weights. It serves nobody yet: an engine that
    was started on a folder of weights holds the base, and a run that goes on has another policy."""
    engine.wait_ready("no version of the policy was published yet")
    if engine.unproved:
        show(f"weights: {engine.unproved}")


def ranks_of(engine: Any) -> int:
    """Number of engine ranks of all engines together; of external ones it is known when they are connected."""
    return sum(one.options.tp_size for one in members(engine))


def members(engine: Any) -> list[Any]:
    """A single engine, or those of a group."""
    from megatron_sglang.engine.group import EngineGroup

    return list(engine.engines) if isinstance(engine, EngineGroup) else [engine]


def announce(config: RunConfig, engine: Any) -> None:
    """Tell `megatron-sglang serve --run` where the engines are; external ones have addresses of their own."""
    if choose(config).mode != "external":
        engine.announce(Path(config.log.run_dir, NAME))


def engine_first(config: RunConfig) -> bool:
    """Is the engine waited for before the trainer's model is built? See `placement.engine_first`."""
    return placement.engine_first(choose(config).mode, devices=devices())


def releases(config: RunConfig) -> bool:
    """Colocated: does the engine give its memory back while the trainer trains? If SGLang's `enable_memory_saver` is
    asked for by name. `ConfigError` with a method that does not bring all weights anew each time."""
    if choose(config).mode != "colocated" or not config.sglang.get("enable_memory_saver"):
        return False
    if config.sync.method not in ("auto", "direct", "generic", "broadcast"):
        raise ConfigError(
            f"sync.method={config.sync.method} with sglang.enable_memory_saver: weights that were released are gone, "
            "and this method does not send all of them; leave one of the two out"
        )
    return True
