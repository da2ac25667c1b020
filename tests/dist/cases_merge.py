"""What a rank of test_layouts.py and test_merge_kernel.py does with units by hand: no layer of a CPU is grouped."""

from __future__ import annotations

import types
from typing import Any

import torch


def grouped_merge(experts: int, chunk: int, fused: bool = False, to: str = "bfloat16") -> dict[str, Any]:
    """Grouped experts, which on a CPU no Megatron layer has: a unit made by hand, merged in chunks. fused: by the GPU's
    kernel."""
    from megatron_sglang.weights import merge

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(3)
    rank, rows, cols = 4, 6, 10
    down, up = torch.randn(experts, rank, cols), torch.randn(experts, rows, rank)
    linear_in, linear_out = (types.SimpleNamespace(weight=factor.bfloat16()) for factor in (down, up))
    adapter = types.SimpleNamespace(alpha=8, dim=rank, linear_in=linear_in, linear_out=linear_out)
    bases = tuple(torch.randn(rows, cols).bfloat16() for _ in range(experts))
    names = tuple(f"decoder.layers.1.mlp.experts.linear_fc1.weight{expert}" for expert in range(experts))
    wrapper: Any = types.SimpleNamespace(adapter=adapter)
    unit = merge.Unit(names, bases, wrapper)
    merge.CHUNK_BYTES = chunk
    stats = merge.MergeStats()
    merge._is_on_gpu = lambda _: fused
    dtype = getattr(torch, to)
    found = merge.merged(unit, dtype, stats, [1.0] * experts)
    exact = [
        base.double() + 2.0 * up[expert].bfloat16().double() @ down[expert].bfloat16().double()
        for expert, base in enumerate(bases)
    ]
    fidelity = stats.fidelity()
    update = torch.stack([whole - base.double() for whole, base in zip(exact, bases, strict=True)])
    lost = torch.stack([whole - got.double() for whole, got in zip(exact, found, strict=True)])
    return {
        "equal": all(torch.equal(got, whole.float().to(dtype)) for got, whole in zip(found, exact, strict=True)),
        "off": max(float((got.double() - whole).abs().max()) for got, whole in zip(found, exact, strict=True)),
        "norm": (fidelity.update_norm, float(update.norm())),
        "loss": (fidelity.cast_loss, float(lost.norm() / update.norm())),
        "changed": fidelity.changed,
        "layers": {str(layer): list(numbers) for layer, numbers in fidelity.layers.items()},
    }


def mixed_merge(experts: int) -> dict[str, Any]:
    """Tasks of two grouped layers in Bridge's order, which goes by expert first: how often is each layer merged?"""
    import dataclasses

    from megatron_sglang.weights import export, merge

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(3)

    @dataclasses.dataclass
    class Task:
        global_param_name: str
        param_weight: torch.Tensor

    units = []
    for layer in ("linear_fc1", "linear_fc2"):
        factors = (torch.randn(experts, 2, 10), torch.randn(experts, 6, 2))
        linear_in, linear_out = (types.SimpleNamespace(weight=factor) for factor in factors)
        adapter = types.SimpleNamespace(alpha=4, dim=2, linear_in=linear_in, linear_out=linear_out)
        names = tuple(f"decoder.layers.0.mlp.experts.{layer}.weight{expert}" for expert in range(experts))
        wrapper: Any = types.SimpleNamespace(adapter=adapter)
        units.append(merge.Unit(names, tuple(torch.randn(6, 10) for _ in names), wrapper))
    tasks = [Task(unit.names[expert], unit.bases[expert]) for expert in range(experts) for unit in units]
    expected = {
        name: weight
        for unit in units
        for name, weight in zip(unit.names, merge.merged(unit, torch.float32, None, [1.0] * experts), strict=True)
    }
    merged, made = export.merged, []
    export.merged = lambda unit, *rest: made.append(unit.names[0]) or merged(unit, *rest)
    merge.Unit.replicas = property(lambda _: 1)  # type: ignore[assignment]
    found = {task.global_param_name: task.param_weight for task in export._with_merged(tasks, units, None, None)}
    return {"made": made, "equal": all(torch.equal(found[name], expected[name]) for name in expected)}
