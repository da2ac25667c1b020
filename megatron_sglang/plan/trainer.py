"""Which rectangles of which Hugging Face tensors each trainer rank holds, from names, shapes and placement alone. Pure.

What `weights/shards.py` finds in a real Megatron model (`tests/dist/test_layouts.py` compares them): layers by PP,
experts by EP, q/k/v by query group and gate/up by rows over TP, o and down by columns, the vocabulary by rows, norms
and routers whole; of latent attention (DeepSeek-V3) what goes up by rows, and whole what goes down, as Transformer
Engine has it: Megatron's own layers would split that too, but they do not run this attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_sglang.buckets import fusion_key
from megatron_sglang.errors import ConfigError, WeightSyncError
from megatron_sglang.placement import Placement, RankPlace
from megatron_sglang.transfer import Box, Place, Region

Shapes = Mapping[str, tuple[int, ...]]

_RULES = (
    (r"model\.embed_tokens\.weight|lm_head\.weight", "vocabulary"),
    (r"model\.norm\.weight", "whole"),
    (r".*(?:_layernorm|[qk]_norm)\.weight", "whole"),
    (r".*\.self_attn\.(?:q_a_proj|kv_a_proj_with_mqa)\.(?:weight|bias)", "whole"),
    (r".*\.self_attn\.(?:q_b_proj|kv_b_proj)\.weight", "rows"),
    (r".*\.mlp\.gate\.(?:weight|e_score_correction_bias)", "whole"),
    (r".*\.self_attn\.([qkv])_proj\.(?:weight|bias)", "qkv"),
    (r".*\.self_attn\.o_proj\.weight", "columns"),
    (r".*\.mlp\.(?:experts\.\d+\.|shared_experts\.)?(gate|up)_proj\.weight", "gate_up"),
    (r".*\.mlp\.(?:experts\.\d+\.|shared_experts\.)?down_proj\.weight", "columns"),
)
"""Names of the hub -> how Megatron splits such a tensor over TP; the first that matches."""

_ADAPTED = ("qkv", "columns", "gate_up")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One HF tensor [rows, cols] and how it is split; `part` is q, k, v, gate or up of a fused parameter."""

    name: str
    rows: int
    cols: int
    layer: int | None
    expert: int | None
    rule: str
    part: str
    param: str
    """Stands for the Megatron parameter that holds it; not Megatron's own name."""


class Trainer:
    """All shards of a run.

    heads: query heads and key-value heads. Raises `ConfigError` for sizes that Megatron or this package refuse, and
    `WeightSyncError` for a tensor whose split is not known.
    """

    def __init__(self, shapes: Shapes, heads: tuple[int, int], placement: Placement) -> None:
        self.placement = placement
        self.heads, self.groups = heads
        self._tensors = [_tensor(name, shape) for name, shape in shapes.items()]
        self._rows = {tensor.name: tensor.rows for tensor in self._tensors}
        self._layers = 1 + max((t.layer for t in self._tensors if t.layer is not None), default=-1)
        self._experts = 1 + max((t.expert for t in self._tensors if t.expert is not None), default=-1)
        self._check()

    def shards(self) -> list[Region]:
        """Of all ranks, in rank order."""
        return [shard for rank in range(self.placement.world_size) for shard in self.of(rank)]

    def of(self, rank: int) -> Iterator[Region]:
        """Of one rank."""
        place = self.placement.of(rank)
        for tensor in self._tensors:
            if self._holds(place, tensor):
                tp, index = (1, 0) if tensor.expert is not None else (self.placement.tp, place.tp)
                for row, col, rows, cols, offset, stride in self._cut(tensor, tp, index):
                    yield Region(rank, tensor.name, Box(row, col, rows, cols), Place(tensor.param, offset, stride, 1))

    def _holds(self, place: RankPlace, tensor: _Tensor) -> bool:
        last = self.placement.pp - 1
        if tensor.layer is None:
            # A tied head on the last stage is a copy of the embedding, which Bridge's mapping leaves out; its memory
            # counts (`plan/memory.py`).
            return place.pp == (0 if tensor.name == "model.embed_tokens.weight" else last)
        if tensor.layer // (self._layers // self.placement.pp) != place.pp:
            return False
        return tensor.expert is None or tensor.expert // (self._experts // self.placement.ep) == place.ep

    def _cut(self, tensor: _Tensor, tp: int, index: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(row, col, rows, cols) of the HF tensor, and offset and row stride in this rank's parameter."""
        rows, cols = tensor.rows, tensor.cols
        if tensor.rule == "whole":
            yield 0, 0, rows, cols, 0, cols
        elif tensor.rule in ("vocabulary", "rows"):
            yield index * (rows // tp), 0, rows // tp, cols, 0, cols
        elif tensor.rule == "columns":
            yield 0, index * (cols // tp), rows, cols // tp, 0, cols // tp
        elif tensor.rule == "gate_up":
            half = rows // tp
            yield index * half, 0, half, cols, 0 if tensor.part == "gate" else half * cols, cols
        else:
            yield from self._query_groups(tensor, tp, index)

    def _query_groups(self, tensor: _Tensor, tp: int, index: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Megatron's rows of a group: its query heads, its key head, its value head; groups one after the other."""
        queries = self.heads // self.groups
        dim = tensor.rows // (self.heads if tensor.part == "q" else self.groups)
        start, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[tensor.part]
        groups = self.groups // tp
        for group in range(groups):
            row = (index * groups + group) * count * dim
            offset = (group * (queries + 2) + start) * dim * tensor.cols
            yield row, 0, count * dim, tensor.cols, offset, tensor.cols

    def _check(self) -> None:
        tp, pp, ep = self.placement.tp, self.placement.pp, self.placement.ep
        sizes = {"attention heads": self.heads, "key-value heads": self.groups}
        sizes["words of the vocabulary"] = self._rows.get("model.embed_tokens.weight", 0)
        sizes |= {
            f"{'columns' if tensor.rule == 'columns' else 'rows'} of {tensor.name}": (
                tensor.cols if tensor.rule == "columns" else tensor.rows
            )
            for tensor in self._tensors
            if tensor.expert is None and tensor.rule in ("columns", "gate_up", "vocabulary", "rows")
        }
        for what, size in sizes.items():
            if size % tp:
                raise ConfigError(f"--tensor-model-parallel-size={tp} does not divide the {size} {what}; use a divisor")
        if self._layers % pp:
            raise ConfigError(f"--pipeline-model-parallel-size={pp} does not divide the {self._layers} layers")
        if ep > 1 and (not self._experts or self._experts % ep):
            raise ConfigError(f"--expert-model-parallel-size={ep} does not divide the {self._experts} experts")


def is_adapted(name: str) -> bool:
    """Does an HF tensor lie in a parameter that gets an adapter by default (`lora.targets`)? Others are sent as is."""
    return name.endswith(".weight") and _rule(name)[0] in _ADAPTED


def _rule(name: str) -> tuple[str, re.Match[str] | None]:
    return next(((rule, match) for pattern, rule in _RULES if (match := re.fullmatch(pattern, name))), ("", None))


def _tensor(name: str, shape: tuple[int, ...]) -> _Tensor:
    rule, found = _rule(name)
    if found is None or len(shape) > 2:
        raise WeightSyncError(
            f"plan: {name} {shape} is no tensor whose split over trainer ranks is known; it knows models of "
            "Llama, Qwen3, Qwen3-MoE, GLM4-MoE and DeepSeek-V3 kind; run others and read the log's first weight sync"
        )
    layer, expert = re.search(r"\.layers\.(\d+)\.", name), re.search(r"\.experts\.(\d+)\.", name)
    rows, cols = (*shape, 1, 1)[:2]
    return _Tensor(
        name,
        rows,
        cols,
        int(layer[1]) if layer else None,
        int(expert[1]) if expert else None,
        rule,
        found[found.lastindex] if found.lastindex else "",
        fusion_key(name) if rule in ("qkv", "gate_up") else name,
    )
