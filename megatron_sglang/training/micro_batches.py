"""This rank's micro-batches of a rollout batch, as Megatron's arguments say.

    --micro-batch-size B               B samples each, padded to the longest
    --max-seqlen-per-dp-cp-rank N      as many samples as N tokens hold, N on each context-parallel rank; packed

Megatron keeps counting by --micro-batch-size (train steps, consumed samples, the schedule of the learning rate): all of
that goes by samples, and a train step has as many as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from megatron_sglang import batching
from megatron_sglang.batching import MicroBatch
from megatron_sglang.types import TrainSample


def of_this_rank(samples: Sequence[TrainSample], args: Any) -> list[list[MicroBatch]]:
    """This rank's micro-batches by train step, on its device. args: Megatron's. All ranks must be given the same
    samples."""
    context, size = mpu.get_context_parallel_rank(), args.context_parallel_size
    place = {"dp_rank": mpu.get_data_parallel_rank(), "dp_size": mpu.get_data_parallel_world_size()}
    # Context parallelism cuts a sequence in 2 CP pieces, sequence parallelism a rank's part in TP.
    multiple = args.tensor_model_parallel_size * (2 * size if size > 1 else 1)
    budget = args.max_seqlen_per_dp_cp_rank
    virtual = mpu.get_virtual_pipeline_model_parallel_world_size()
    if budget:
        by_step = batching.split_by_tokens(
            samples,
            global_batch=args.global_batch_size,
            budget=budget * size,
            multiple_of=multiple,
            run=(args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size) if virtual else 1,
            **place,
        )
    else:
        multiple = 8 * args.tensor_model_parallel_size * size
        by_step = batching.split(
            samples, global_batch=args.global_batch_size, micro_batch=args.micro_batch_size, **place
        )
    return [
        [
            batching.collate(part, multiple, packed=bool(budget)).of_context_rank(context, size).to(_device())
            for part in step
        ]
        for step in by_step
    ]


def counted(forward_backward: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`forward_backward` over `count` micro-batches, whatever number it is told."""

    def run(*args: Any, num_microbatches: int, **kwargs: Any) -> Any:
        return forward_backward(*args, num_microbatches=count, **kwargs)

    return run


def _device() -> torch.device:
    current = torch.cuda.current_device()
    return current if isinstance(current, torch.device) else torch.device("cuda", current)
