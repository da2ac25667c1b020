"""Megatron's model with adapters but without training, for the converter: built alone or on torchrun's ranks.

The only file of this folder that stands above `training`: it builds the model exactly as a run does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megatron_sglang.checkpoint_folder import RELEASE, STATE_FILE, TRACKER, folder_of, newest, write_state
from megatron_sglang.comm import TorchComm
from megatron_sglang.config import DataConfig, LoraConfig, ModelConfig, RolloutConfig, RunConfig
from megatron_sglang.config_check import check, resolve
from megatron_sglang.cpu import trainer as cpu_room
from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.hf_files import count_experts


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint of this package on disk."""

    folder: Path
    lora: LoraConfig
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Model:
    """This rank's part of the model."""

    bridge: Any
    chunks: list[Any]
    comm: TorchComm


def find_checkpoint(load: Path, iteration: int | None) -> Stored:
    """The newest checkpoint of `load`, or that of `iteration`. Raises DataError."""
    try:
        which = newest(load) if iteration is None else str(iteration)
    except OSError as error:
        raise DataError(f"--load {load} holds no checkpoint ({error}); give the folder that --save named") from error
    if which != RELEASE and not which.isdecimal():
        raise DataError(f"{load / TRACKER} says {which!r}; expected an iteration, choose one with --iteration")
    folder = folder_of(load, which)
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
        lora = state["lora"]
        options = LoraConfig(rank=lora["rank"], alpha=lora["alpha"], targets=tuple(lora["targets"]))
        return Stored(folder, options, state["dtype"])
    except (OSError, ValueError, KeyError) as error:
        have = ", ".join(sorted(path.parent.name for path in load.glob(f"*/{path.name}"))) or "none"
        raise DataError(
            f"{path} does not tell the adapters' options ({type(error).__name__}: {error}); checkpoints of this "
            f"package in {load}: {have}, choose one with --iteration"
        ) from error


def write_stored(folder: Path, lora: LoraConfig, dtype: str) -> None:
    """What `find_checkpoint` reads, for a checkpoint that no run has written."""
    write_state(folder, {"lora": asdict(lora), "dtype": dtype})


@contextlib.contextmanager
def adapted_model(
    hf_model: Path, lora: LoraConfig, dtype: Literal["float32", "bfloat16"], sizes: Mapping[str, int], base: bool
) -> Iterator[Model]:
    """Build `hf_model` with adapters as a run with this `lora` does. Collective over all ranks.

    sizes: Megatron's parallel sizes by flag name. base: False leaves the base weights unread. What Megatron prints
    goes into the notes of an error.
    """
    said = io.StringIO()
    with _alone_unless_launched():
        # Megatron demands it with tensor parallelism; the launcher of a run sets it for that.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                cpu_room.enter()
                with _megatron(_config(hf_model, lora, dtype, sizes, base)) as model:
                    yield model
        except BaseException as error:
            error.add_note(f"Megatron's output:\n{said.getvalue()[-4000:]}")
            raise


def load_adapters(model: Model, folder: Path) -> None:
    """Load the adapters of a checkpoint of any layout. DataError on all ranks: it is damaged, or another model's."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.utils import unwrap_model
    from torch.distributed.checkpoint.api import CheckpointException

    chunks = unwrap_model(model.chunks)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
        wanted = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
        _check_fits(model.comm, wanted, folder)
        state: Any = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise DataError(f"{folder} cannot be read ({error}); it is damaged, choose another with --iteration") from error
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])


def save_release(model: Model, folder: Path) -> None:
    """Write the adapters to `folder` as Megatron's release checkpoint. Collective."""
    from megatron.training import checkpointing, get_args

    from megatron_sglang.training import checkpoint

    checkpoint.write_in_process()
    args: Any = get_args()
    args.save, args.no_save_optim, args.no_save_rng = str(folder), True, True
    checkpointing.save_checkpoint(0, model.chunks, None, None, 0, release=True)


def leave() -> None:
    """End the ranks' connection, before a process that torchrun started ends."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_fits(comm: TorchComm, wanted: dict[str, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def tensors(value: Any) -> Iterator[Any]:
        parts = value.build() if isinstance(value, ShardedTensorFactory) else value
        yield from (part for part in nested_values({"": parts}) if isinstance(part, ShardedTensor))

    ours = {part.key: list(part.global_shape) for value in nested_values(wanted) for part in tensors(value)}
    every = {key: shape for found in comm.gather(ours) for key, shape in found.items()}
    stored = {
        key: list(value.global_shape)
        for key, value in dist_checkpointing.load_tensors_metadata(str(folder)).items()
        if ".adapter." in key and not key.startswith("optimizer")
    }
    odd = sorted(key for key in every.keys() | stored.keys() if every.get(key) != stored.get(key))
    if odd:
        raise DataError(
            f"{folder} is of another model or other adapters: {len(odd)} tensors differ, the first is {odd[0]}, in the "
            f"checkpoint {stored.get(odd[0], 'absent')}, in the model {every.get(odd[0], 'absent')}; "
            "give --hf-model the folder that the run had"
        )


def _config(
    hf_model: Path, lora: LoraConfig, dtype: Literal["float32", "bfloat16"], sizes: Mapping[str, int], base: bool
) -> RunConfig:
    """The configuration of a run that never takes a step: only model, adapters and layout matter."""
    world = int(os.environ["WORLD_SIZE"])
    stages = sizes.get("pipeline-model-parallel-size", 1)
    for name in ("tensor-model-parallel-size", "expert-model-parallel-size"):
        needed = sizes.get(name, 1) * stages
        if world % needed:
            raise ConfigError(
                f"--{name}={sizes.get(name, 1)} with {stages} pipeline stages needs {needed} ranks or a multiple, "
                f"there are {world}; start that many with torchrun --nproc-per-node"
            )
    # Nothing is trained; and without APEX Megatron refuses to build layers that would fuse it.
    megatron = dict(sizes) | {"micro-batch-size": 1, "no-gradient-accumulation-fusion": True}
    if not cpu_room.needed() and count_experts(json.loads((hf_model / "config.json").read_text())):
        megatron["moe-grouped-gemm"] = True  # as in runs on GPUs; Bridge knows the experts of GLM4-MoE in no other way
    if sizes.get("tensor-model-parallel-size", 1) > 1:
        megatron["sequence-parallel"] = True  # Megatron demands it for experts; weights are the same without
    config = RunConfig(
        model=ModelConfig(hf_path=str(hf_model), dtype=dtype, random_weights=not base),
        data=DataConfig(train="-", max_prompt_tokens=64),
        lora=lora,
        rollout=RolloutConfig(max_new_tokens=64, prompts_per_batch=world, samples_per_prompt=2, batches=1),
        megatron=megatron,
    )
    check(config, local_world_size=1, trains=False)
    return resolve(config, local_world_size=1)


@contextlib.contextmanager
def _megatron(config: RunConfig) -> Iterator[Model]:
    """Megatron's set-up without optimizer; what it keeps for a process is taken down in the end."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars, initialize, training

    from megatron_sglang.training.model import ModelRecipe

    if parallel_state.is_initialized():
        raise ConfigError("this process is part of a run already; convert in a process of its own")
    initialize._compile_dependencies = lambda: None  # see training/plugin.py
    try:
        recipe = ModelRecipe(config)
        training.initialize_megatron()
        chunks = training.get_model(recipe.model_provider, wrap_with_ddp=False)
        yield Model(recipe.bridge, cast("list[Any]", chunks), TorchComm())
    finally:
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def _alone_unless_launched() -> Iterator[None]:
    """Without torchrun, be the only rank. With it, its ranks stay joined for the next conversion, until `leave`."""
    if "RANK" in os.environ:
        yield
        return
    from megatron_sglang.store import AGENT_STORE, open_store

    store, port = open_store("127.0.0.1")
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": port, **AGENT_STORE}
    os.environ |= {name: str(value) for name, value in alone.items()}
    try:
        yield
    finally:
        leave()
        del store
        for name in alone:
            os.environ.pop(name, None)
