"""What SGLang's LoRA holds of an adapter, proved inside each engine rank before any request may ask for it.

SGLang keeps an adapter on the CPU when it is loaded, fuses q, k, v and gate, up, and copies it into its memory pool
when the first request comes. What matches no module is skipped with a warning, or with `lora_strict_loading` raised
there, which ends the engine. So all of it is done here, where an error is an answer:

    file       every tensor has the digest that its writer computed
    held       every tensor is in SGLang's memory, whole, in its place; the scale is ours
    bound      every held tensor belongs to a wrapped module of its layer
    pool       the slot that requests will use holds it (experts: SGLang's own copy is not compared)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sglang.digests import digest
from megatron_sglang.peft_names import PREFIX, WEIGHTS, factor_names

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def prove(model: Any, message: Mapping[str, Any]) -> int:
    """How many tensors of the adapter are bound: all. ValueError otherwise. message: name, folder, digests, scale."""
    name = message["name"]
    given = _read(Path(message["folder"], WEIGHTS), message["digests"])
    fake = getattr(model, "adapters", None)  # of engine/fake.py
    if fake is not None:
        if name not in fake:
            raise ValueError(f"adapter {name} is not loaded; have {sorted(fake)}")
        _compare(name, given, fake[name])
        return len(given)
    manager = _manager(model)
    identity = next((key for key, ref in manager.lora_refs.items() if ref.lora_name == name), None)
    if identity is None:
        raise ValueError(
            f"adapter {name} is not loaded; have {sorted(r.lora_name for r in manager.lora_refs.values())}"
        )
    adapter = manager.loras[identity]
    if adapter.scaling != message["scale"]:
        raise ValueError(f"adapter {name} would be scaled by {adapter.scaling}, the trainer does by {message['scale']}")
    held = {key: tensor for layer in adapter.layers for key, tensor in layer.weights.items()}
    _compare(name, given, held)
    bound = {module for modules in manager.lora_modules for module in modules}
    for key in held:
        if (module := _module_of(key)) not in bound:
            raise ValueError(
                f"adapter {name}: {key} belongs to {module}, which SGLang has not wrapped; it would be lost"
            )
    manager.fetch_new_loras({identity})
    _compare_pool(name, manager, identity)
    return len(given)


def _read(path: Path, digests: Mapping[str, int]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); publish again") from error
    if odd := sorted(given.keys() ^ digests.keys()):
        raise ValueError(f"{path} lacks or adds {len(odd)} tensors, {odd[0]} first; publish again")
    for key, tensor in given.items():
        if digest(tensor) != digests[key]:
            raise ValueError(f"{path}: {key} has another digest than was written; publish again")
    return given


def _compare(name: str, given: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Everything given is held, fused or not, and nothing else."""
    used: set[str] = set()
    for key, tensor in held.items():
        leaf = next((leaf for leaf in _FUSED if f".{leaf}." in key), None)
        parts = [key] if leaf is None or key in given else [key.replace(leaf, part) for part in _FUSED[leaf]]
        if missing := [part for part in parts if part not in given]:
            raise ValueError(f"adapter {name}: SGLang holds {key}, of which {missing[0]} was not given")
        expected = torch.cat([given[part] for part in parts])
        if tensor.shape != expected.shape or not torch.equal(tensor.cpu(), expected):
            raise ValueError(f"adapter {name}: what SGLang holds as {key} is not what was given")
        used.update(parts)
    if lost := sorted(given.keys() - used):
        raise ValueError(f"adapter {name}: SGLang dropped {len(lost)} of {len(given)} tensors, {lost[0]} first")


def _module_of(key: str) -> str:
    """SGLang's name of the wrapped module that a held tensor is for."""
    module = re.sub(r"\.lora_[AB]\.weight$", "", key.removeprefix(PREFIX))
    return re.sub(r"\.experts\.\d+\..*", ".experts", module)


def _compare_pool(name: str, manager: Any, identity: str) -> None:
    from sglang.srt.lora.utils import LoRAType, get_target_module_name

    pool, adapter = manager.memory_pool, manager.loras[identity]
    slot, rank = pool.get_buffer_id(identity), adapter.config.r
    for layer, modules in enumerate(manager.lora_modules):
        weights = adapter.layers[layer].weights
        for module_name, module in modules.items():
            down, up = map(weights.get, factor_names(module_name))
            if down is None or up is None or not hasattr(module, "slice_lora_a_weights"):
                continue
            target = get_target_module_name(module_name, pool.target_modules)
            down, up = module.slice_lora_a_weights(down), module.slice_lora_b_weights(up)
            in_pool = pool.get_tensor(target, layer, LoRAType.LORA_A)[slot, : len(down)]
            in_pool_b = pool.get_tensor(target, layer, LoRAType.LORA_B)[slot, :, :rank]
            for found, expected in ((in_pool, down), (in_pool_b, up)):
                if not torch.equal(found.cpu(), expected.to(found.dtype).cpu()):
                    raise ValueError(f"adapter {name}: the pool's slot {slot} does not hold what {module_name} needs")


def _manager(model: Any) -> Any:
    """SGLang gives a loader the model alone; who called it has the rest (model_runner_components/weight_updater.py:57).
    The garbage collector would not find it where it was told to freeze."""
    frame = inspect.currentframe()
    while frame is not None:
        ask = getattr(frame.f_locals.get("self"), "get_model_runner", None)
        if callable(ask):
            manager = getattr(ask(), "lora_manager", None)
            if manager is not None and manager.base_model is model:
                return manager
        frame = frame.f_back
    raise ValueError("this engine was started without enable_lora; the sync method `adapter` needs it")
