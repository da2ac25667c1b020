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
        tasks = _unfinished(tasks, comm, expected, done)
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


def _unfinished(tasks: list[Any], comm: TorchComm, expected: Mapping[str, Any], done: Collection[str]) -> list[Any]:
    """The tasks that still have something to write on any rank; all ranks leave out the same ones.

    The ranks must agree, because an expert's task has another name on each of them. If the tasks of all ranks together
    do not name all of `expected` (for some architectures Bridge adds tensors), none is left out: then everything is
    computed again, though not written again.
    """
    names = [_names(task) for task in tasks]
    mine = set().union(*names)
    # One character for each tensor, and below for each task, since there may be thousands of them.
    named_by_rank = comm.gather("".join("01"[name in mine] for name in sorted(expected)))
    if not all("1" in ranks for ranks in zip(*named_by_rank, strict=True)):
        return tasks
    done_by_rank = comm.gather("".join("01"[all(name in done for name in of_task)] for of_task in names))
    return [task for task, ranks in zip(tasks, zip(*done_by_rank, strict=True), strict=True) if "0" in ranks]


def _names(task: Any) -> list[str]:
    """HF names of what a task exports."""
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())
