"""A PEFT adapter folder: adapter_config.json and adapter_model.safetensors. Torch only; nothing of Megatron, no `peft`.

Two layouts are read. Written is the first, one pair of factors for each linear layer and each expert:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight          [out, r]
    base_model.model.model.layers.0.mlp.experts.5.gate_proj.lora_A.weight   [r, in], 5 counts over all experts

It is what transformers 4, vLLM and SGLang have; peft (0.19 and later) stacks it on loading where transformers 5 keeps
the experts of a layer in one parameter. The second is what peft saves from there, E experts stacked:

    ....mlp.experts.base_layer.lora_A.weight   gate_up_proj: [E * r, in], expert by expert
    ....mlp.experts.base_layer.lora_B.weight                 [2 * out, r * E], rank by rank
    ....mlp.experts.lora_A.weight, lora_B      down_proj, alike

Module names are those of the Hugging Face weights without `.weight`, e.g. "model.layers.0.self_attn.q_proj".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from megatron_sglang.buckets import fusion_key
from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import DataError
from megatron_sglang.peft_names import CONFIG, PREFIX, WEIGHTS, factor_names
from megatron_sglang.weights.write import TensorFile

_ONLY_IN_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
_PLAIN = {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False}
"""Options of PEFT that Megatron's LoRA has no counterpart for, and the only value that can be read."""
_TARGETS = {
    "qkv_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
    "gate": "router",
}
"""Last part of an HF module's name, with q, k, v and gate, up fused as in Megatron -> Megatron's name of that layer."""
_NOT_A_DELTA = (
    *("modules_to_save", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of PEFT with which the adapter is more than W + scale B A for every token; refused if they are set."""
_KEEP_THE_BASE = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that start on the base as it is (peft 0.21). The others (pissa, olora, corda, loftq,
lora_ga) take something out of it, which the factors then hold: on the base itself they are another model."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter: the weight gets `scale * up @ down`."""

    down: torch.Tensor
    """A, [r, in]."""
    up: torch.Tensor
    """B, [out, r]."""
    scale: float = 1.0


def join(parts: Sequence[Factors], scale: float) -> Factors:
    """One adapter for a fused layer, whose delta is the deltas of its parts stacked: exactly, not by approximation.

    Its A has all rows of the parts' A, those that they share once, so its rank is the number of different rows. Its
    scale is `scale`: the B of a part with another one is multiplied accordingly.
    """
    count, columns = _distinct_rows(parts)
    first = parts[0]
    down = first.down.new_empty(count, first.down.shape[1])
    up = first.up.new_zeros(sum(len(part.up) for part in parts), count)
    below = 0
    for part, column in zip(parts, columns, strict=True):
        down[column] = part.down
        scaled = part.up if part.scale == scale else part.up * (part.scale / scale)
        up[below : below + len(part.up)].index_add_(1, column, scaled)
        below += len(part.up)
    return Factors(down, up, scale)


def _distinct_rows(parts: Sequence[Factors]) -> tuple[int, list[torch.Tensor]]:
    """How many different rows the A of `parts` have together, and for each part where its rows are among them."""
    place: dict[bytes, int] = {}
    columns = []
    for part in parts:
        rows = part.down.contiguous().view(torch.uint8).numpy()
        columns.append(torch.tensor([place.setdefault(row.tobytes(), len(place)) for row in rows]))
    return len(place), columns


Shapes = tuple[Sequence[int], Sequence[int]]
"""Of A [r, in] and B [out, r]."""


class AdapterWriter:
    """An adapter folder that takes its modules one by one, in any order; none is held, though peft wants one file.

    shapes: of every module that will come. All have the scale alpha / rank. base: where the base model is found.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Shapes], dtype: torch.dtype, *, rank: int, alpha: float, base: str
    ) -> None:
        every = {**shapes, **_idle_down(shapes)}  # placeholders are never put, and so stay zeros (`TensorFile`)
        self._file = TensorFile(
            folder / WEIGHTS,
            {
                name: shape
                for module, pair in every.items()
                for name, shape in zip(factor_names(module), pair, strict=True)
            },
            dtype,
        )
        modules, parameters = _targets(every)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": 0.0,  # acts in training only, and peft refuses it for stacked experts
            "target_modules": modules,
            "target_parameters": parameters or None,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "modules_to_save": None,
        }
        (folder / CONFIG).write_text(json.dumps(config | _PLAIN, indent=2) + "\n")

    def extend(self, factors: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Write A and B of some modules, on any device."""
        for module, pair in factors.items():
            for name, factor in zip(factor_names(module), pair, strict=True):
                self._file.put(name, factor)

    def close(self) -> None:
        self._file.close()


def _idle_down(shapes: Mapping[str, Shapes]) -> dict[str, Shapes]:
    """Shapes of placeholders, adapters of zeros, for the down_proj of experts where only gate and up are adapted.

    Without them peft 0.21 looks for gate_up_proj under another name than it has itself given to it, and loads nothing.
    """
    idle: dict[str, Shapes] = {}
    for module, ((rank, hidden), (out, _)) in shapes.items():
        expert = re.fullmatch(r"(.*\.experts\.\d+)\.gate_proj", module)
        if expert and f"{expert[1]}.down_proj" not in shapes:
            idle[f"{expert[1]}.down_proj"] = ([rank, out], [hidden, rank])
    return idle


def _targets(modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """PEFT's target_modules and target_parameters.

    In a model with experts peft takes the leaf names gate_proj, up_proj, down_proj for the experts alone, so dense and
    shared MLPs are named as parameters.
    """
    names = list(modules)
    has_experts = any(re.search(r"\.experts\.\d+\.", name) for name in names)
    leaves, parameters = set(), []
    for name in names:
        leaf = name.rpartition(".")[2]
        if has_experts and leaf in _ONLY_IN_EXPERTS and not re.search(r"\.experts\.\d+\.", name):
            parameters.append(f"{name}.weight")
        else:
            leaves.add(leaf)
    return sorted(leaves), parameters


class AdapterFolder:
    """A PEFT adapter opened for reading; tensors are read from disk when they are asked for.

    experts: routed experts of the base model (0: none), to cut stacked tensors. Raises DataError for what is no LoRA
    adapter, uses an option that Megatron's LoRA lacks, or is damaged.
    """

    def __init__(self, folder: Path, experts: int) -> None:
        self.folder, self.experts = folder, experts
        self.config = _read_config(folder)
        try:
            self._file = safe_open(folder / WEIGHTS, framework="pt")
            keys = list(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / WEIGHTS} cannot be read ({error}); fetch the adapter again") from error
        self._readers: dict[str, Callable[[], Factors]] = {}
        self._stacks: dict[str, torch.Tensor] = {}
        for key in keys:
            module, found, factor = key.removeprefix(PREFIX).rpartition(".lora_")
            if not found or factor not in ("A.weight", "B.weight"):
                raise DataError(f"{folder / WEIGHTS}: {key} is no factor of a linear layer; only plain LoRA is read")
            if key.endswith("B.weight"):
                self._add(module, key)
        if 2 * len([key for key in keys if key.endswith("B.weight")]) != len(keys):
            raise DataError(f"{folder / WEIGHTS}: not every lora_A has its lora_B; fetch the adapter again")

    @property
    def modules(self) -> list[str]:
        """Adapted modules; stacked experts one by one."""
        return list(self._readers)

    def factors(self, module: str) -> Factors | None:
        """Read one adapter from disk; None where `module` has none."""
        reader = self._readers.get(module)
        return reader() if reader is not None else None

    def lora_config(self, rank: int | None) -> LoraConfig:
        """The options of a Megatron model that can hold this adapter; `rank`: None is the least that will do.

        Reads every A: q, k and v whose A differ need the rank of all three, because Megatron gives them one A.
        """
        fused: dict[str, list[str]] = {}
        for module in self.modules:
            fused.setdefault(fusion_key(f"{module}.").removesuffix("."), []).append(module)
        targets = set()
        needed, largest = 0, ""
        for name, modules in fused.items():
            leaf = name.rpartition(".")[2]
            if leaf not in _TARGETS:
                raise DataError(f"{self.folder} adapts {modules[0]}, for which Megatron's LoRA has no target")
            targets.add(_TARGETS[leaf])
            found, _ = _distinct_rows([self._readers[module]() for module in modules])
            needed, largest = max((needed, largest), (found, " and ".join(modules)))
        if rank is not None and rank < needed:
            raise DataError(f"--lora-rank {rank} is below {needed}, the rank that {largest} need together")
        alpha = float(self.config.get("lora_alpha", 8))
        rank_given = self.config.get("r", 8)
        scale = alpha / (math.sqrt(rank_given) if self.config.get("use_rslora") else rank_given)
        rank = rank or needed
        ordered = tuple(target for target in _TARGETS.values() if target in targets)
        return LoraConfig(rank=rank, alpha=scale * rank, targets=cast("Any", ordered))

    def _add(self, module: str, key_b: str) -> None:
        stacked = re.fullmatch(r"(.*\.experts)(\.base_layer)?", module)
        if stacked is None:
            self._readers[module] = lambda: self._plain(module)
            return
        fused = "gate_up_proj" if self._is_gate_up(module) else "down_proj"
        name = f"{stacked[1]}.{fused}"
        if not self.experts or self._file.get_slice(key_b).get_shape()[1] % self.experts:
            raise DataError(f"{self.folder}: {module} does not hold {self.experts} experts; is it of another model?")
        parts = {"gate_proj": 0, "up_proj": 1} if fused == "gate_up_proj" else {"down_proj": None}
        for expert in range(self.experts):
            for leaf, half in parts.items():
                self._readers[f"{stacked[1]}.{expert}.{leaf}"] = lambda expert=expert, half=half: self._of_stack(
                    module, name, expert, half
                )

    def _is_gate_up(self, module: str) -> bool:
        """peft wraps a layer's parameters one by one: gate_up_proj inside, down_proj around it."""
        targets = [str(target) for target in self.config.get("target_parameters") or ()]
        return module.endswith(".base_layer") or not any(target.endswith("down_proj") for target in targets)

    def _plain(self, module: str) -> Factors:
        down, up = map(self._file.get_tensor, factor_names(module))
        return Factors(down, up, self._scale(module, len(down)))

    def _of_stack(self, module: str, name: str, expert: int, half: int | None) -> Factors:
        """One expert out of a stack. name: PEFT's of the parameter, for its scale. half: 0 gate, 1 up, None: all."""
        down_name, up_name = factor_names(module)
        slice_a = self._file.get_slice(down_name)
        rank = slice_a.get_shape()[0] // self.experts
        down = slice_a[expert * rank : (expert + 1) * rank]
        up = self._whole(up_name)[:, expert :: self.experts]
        if half is not None:
            up = up.chunk(2)[half]
        return Factors(down, up, self._scale(name, rank))

    def _whole(self, key: str) -> torch.Tensor:
        """A stack of B, kept while the experts of its layer are read: their columns lie interleaved."""
        if key not in self._stacks:
            if len(self._stacks) == 2:
                self._stacks.clear()
            self._stacks[key] = self._file.get_tensor(key)
        return self._stacks[key]

    def _scale(self, module: str, rank: int) -> float:
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, given in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(given)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give the folder of a PEFT adapter") from error
    if config.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {config.get('peft_type')}; only LORA can be converted")
    given = {name: config.get(name) or plain for name, plain in _PLAIN.items()}
    odd = {name: value for name, value in given.items() if value != _PLAIN[name]}
    odd |= {name: config[name] for name in _NOT_A_DELTA if config.get(name)}
    if odd:
        name, value = next(iter(odd.items()))
        raise DataError(f"{path}: {name}={value} has no counterpart in Megatron's LoRA; train the adapter without it")
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _KEEP_THE_BASE:
        raise DataError(
            f"{path}: init_lora_weights={start} has changed the base that the adapter belongs to; expected an adapter "
            "of the base as it is: save it with peft's path_initial_model_for_weight_conversion, or merge the two"
        )
    return config
