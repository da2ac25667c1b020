"""Merged weights for a file: one parameter at a time, so that no more than that is held besides the model.

`export.py` serves an engine, which wants the tensors of a layer side by side and so holds a layer of full tensors. A
file takes them in any order: here they come in Bridge's, each merged when its turn comes, and what is written already
is left out. Collective: all ranks iterate together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from megatron_sglang.comm import TorchComm
from megatron_sglang.errors import DataError
from megatron_sglang.weights.export import exported
from megatron_sglang.weights.merge import units_of


def merged_tensors(
    bridge: Any,
    model_chunks: list[torch.nn.Module],
    comm: TorchComm,
    expected: Mapping[str, tuple[int, ...]],
    done: Collection[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, full tensor, maybe a view of the model's own) for each name of `expected` that is not in `done`.

    expected: name -> shape of the whole HF model. Raises DataError on all ranks: a name comes twice, is unknown, has
    another shape, or does not come.
    """
    tasks = [task for task in bridge.get_conversion_tasks(model_chunks) if task is not None]
    if done:
        tasks = _without(tasks, comm, expected, done)
    missing = set(expected)
    for name, tensor in exported(bridge, model_chunks, tasks, units_of(bridge, model_chunks)):
        if expected.get(name) != tuple(tensor.shape):
            raise DataError(
                f"{name} is {list(tensor.shape)} in Megatron, {expected.get(name, 'absent')} in the Hugging Face "
                "model; Megatron-Bridge does not fit this architecture"
            )
        if name not in missing:
            raise DataError(f"{name} was exported twice, expected once; Megatron-Bridge does not fit this architecture")
        missing.remove(name)
        if name not in done:
            yield name, tensor.detach()
    missing.difference_update(done)
    if missing:
        raise DataError(
            f"{len(missing)} tensors of the Hugging Face model have no counterpart in Megatron's, {min(missing)} "
            "first; Megatron-Bridge does not know this architecture whole"
        )


def _without(tasks: list[Any], comm: TorchComm, expected: Mapping[str, Any], done: Collection[str]) -> list[Any]:
    """`tasks` less those of which every name is done, the same choice on all ranks.

    An expert's task has other names on each rank. Where the tasks do not name all that Bridge will export (it adds
    tensors to some architectures), none is left out: they are computed again, and not written again.
    """
    names = [_names(task) for task in tasks]
    mine = set().union(*names)
    order = sorted(expected)
    foretold = comm.gather("".join("01"[name in mine] for name in order))
    if not all("1" in column for column in zip(*foretold, strict=True)):
        return tasks
    finished = comm.gather("".join("01"[all(name in done for name in of_task)] for of_task in names))
    return [task for task, column in zip(tasks, zip(*finished, strict=True), strict=True) if "0" in column]


def _names(task: Any) -> list[str]:
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())
