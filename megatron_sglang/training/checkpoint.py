"""What a checkpoint is here: Megatron's own torch_dist checkpoint without the frozen base, and one JSON file
(`checkpoint_folder.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sglang.checkpoint_folder import STATE_FILE, TRACKER, folder_of, newest, read_state
from megatron_sglang.config import LoraConfig, RunConfig
from megatron_sglang.errors import ConfigError, DataError, OnOtherRank
from megatron_sglang.feed.sampler import Feed


def only_adapters(model: Any) -> None:
    """Make `model`, a module of Megatron's, save and load its adapters alone: the base comes from the Hugging Face
    folder each time."""
    sharded_state_dict, load_state_dict = model.sharded_state_dict, model.load_state_dict

    def adapters_of(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in sharded_state_dict(*args, **kwargs).items() if ".adapter." in key}

    def load_adapters(state: dict[str, Any], strict: bool = True) -> Any:
        result = load_state_dict(state, strict=False)
        missing = [key for key in result.missing_keys if ".adapter." in key and "_extra_state" not in key]
        if strict and (missing or result.unexpected_keys):
            raise DataError(
                f"the checkpoint lacks {len(missing)} adapters of this model ({missing[:1]}) and has "
                f"{len(result.unexpected_keys)} it does not know ({result.unexpected_keys[:1]}); "
                "resume with the lora.* options it was saved with"
            )
        return result

    model.sharded_state_dict = adapters_of
    model.load_state_dict = load_adapters


def write_in_process() -> None:
    """Save without Megatron's queue process, for saves that are not asynchronous.

    filesystem_async.py:65 starts a multiprocessing Manager by spawn even when the writer runs in this process: that
    imports the main script again (20 s for each rank), and the Manager outlives a rank that is killed.
    """
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results
    _forget_what_failed_writes_held()


def _forget_what_failed_writes_held() -> None:
    """A write returns its exception, whose frames hold io.BytesIO objects and views of them, in a cycle with itself:
    CPython 3.12's collector crashes when it finds an object and its view (`getbuffer`) in the same cycle."""
    writer = filesystem_async.FileSystemWriterAsync
    original: Any = writer.write_preloaded_data

    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        number, result = original(*args, **kwargs)
        if isinstance(result, Exception):
            traceback.clear_frames(result.__traceback__)
        return number, result

    writer.write_preloaded_data = staticmethod(write)


def require_continuable(args: Any, config: RunConfig) -> None:
    """DataError unless this run can go on from the checkpoint that `args`, Megatron's, will load, if there is one."""
    _require_asked_for(args)
    _require_same_adapters(args, config.lora)
    _require_same_pace(args, config)


def _require_asked_for(args: Any) -> None:
    """DataError where `args`, Megatron's, refuse to begin anew and there is no checkpoint. Megatron would end the
    process there, as if all had gone well."""
    if not args.exit_on_missing_checkpoint or args.pretrained_checkpoint:
        return
    if not _has_checkpoint(args):
        raise DataError(
            f"--exit-on-missing-checkpoint: --load {args.load} holds no checkpoint; give the folder that --save named, "
            "or leave the flag out to begin anew"
        )


def _require_same_adapters(args: Any, lora: LoraConfig) -> None:
    """DataError unless the checkpoint that `args`, Megatron's, will load has adapters like `lora`. Asked before it is
    loaded: with another alpha it would be read without an error, and each adapter would count more, or less, than it
    was trained to; of another rank or other targets Megatron only says that a shape or a key is not what it expected.
    A converted one ("release") has them, too. Not with --finetune, which begins a new run."""
    if not (which := _to_load(args)):
        return
    folder = folder_of(args.load, which)
    if not which.isdecimal() and not (folder / STATE_FILE).exists():  # converted by others
        return
    saved = read_state(folder).get("lora", {})
    for name, wanted in dataclasses.asdict(lora).items():
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if (found := saved.get(name, wanted)) != wanted:
            raise DataError(
                f"the checkpoint {folder} was saved with lora.{name}={found}, this run has lora.{name}={wanted}; give "
                "the lora.* options that it was saved with"
            )


def _require_same_pace(args: Any, config: RunConfig) -> None:
    """DataError unless the checkpoint that `args`, Megatron's, will load has had as many train steps for each rollout
    batch as this run has. Megatron goes on at its iteration: the run would end batches too early, or too late.

    A fed batch may be of any number of train steps, and one that Megatron was told to skip has none."""
    which = _to_load(args)
    if not which.isdecimal() or Feed.asked_for(config) or args.iterations_to_skip:
        return
    state, steps = read_state(folder_of(args.load, which)), config.rollout.samples // args.global_batch_size
    batches, more = state["rollout_step"], state.get("trained", 0)
    if int(which) != batches * steps + more:
        raise DataError(
            f"the checkpoint of iteration {which} in {args.load} has had {int(which) - more} train steps for {batches} "
            f"rollout batches, this run has {steps} for each (prompts x samples / --global-batch-size); resume with "
            "the sizes that it was saved with, or change them in proportion"
        )


def _to_load(args: Any) -> str:
    """The iteration, or `RELEASE`, that a run goes on from; empty where it begins anew."""
    if args.finetune or not _has_checkpoint(args):
        return ""
    return str(args.ckpt_step or newest(args.load))


def _has_checkpoint(args: Any) -> bool:
    """Whether --load has a checkpoint, or one is named; whether that is there, reading it says."""
    return bool(args.load and (args.ckpt_step or Path(args.load, TRACKER).exists()))


@contextlib.contextmanager
def writing(save: str, iteration: int) -> Iterator[None]:
    """Turn whatever fails in a save into a DataError that says what is still there."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        there = next(folder for folder in (Path(save), *Path(save).absolute().parents) if folder.exists())
        free_mb = shutil.disk_usage(there).free >> 20
        _raise_explained(
            f"the checkpoint of iteration {iteration} could not be written to {save} ({free_mb} MB free)",
            error,
            f"those before it are complete: make room, or save less often, and resume with --load {save}",
        )


@contextlib.contextmanager
def reading(load: str | None) -> Iterator[None]:
    """Turn what Megatron raises on a checkpoint that it cannot use into a DataError or ConfigError."""
    try:
        yield
    except (CheckpointException, CheckpointingException) as error:
        _raise_explained(
            f"the checkpoint in {load} cannot be read", error, "it is damaged: load an earlier one with --ckpt-step"
        )
    except AssertionError as error:
        if not str(error).startswith("OptimizerParamScheduler"):
            raise
        raise ConfigError(
            f"the checkpoint in {load} has another schedule: {error}; give --override-opt-param-scheduler to take "
            "that of this command line, --use-checkpoint-opt-param-scheduler to keep the checkpoint's"
        ) from error
    except (KeyError, RuntimeError) as error:
        # Where experts are spread otherwise than the rest, Megatron's optimizer is a chain of two, which does not read
        # the state of a single one, nor is it read by one.
        frames = traceback.extract_tb(error.__traceback__)
        found = any(frame.name == "load_state_dict" and "optimizer" in Path(frame.filename).stem for frame in frames)
        if not found or type(error) not in (KeyError, RuntimeError):  # out of memory is another RuntimeError
            raise
        raise ConfigError(
            f"the checkpoint in {load} has the optimizer of another layout ({type(error).__name__}: {error}); give the "
            "parallel sizes that it was saved with, or --no-load-optim to begin with a fresh optimizer"
        ) from error


def _raise_explained(what: str, error: BaseException, remedy: str) -> NoReturn:
    """torch raises one exception on all ranks, and gives the details to one of them."""
    failures = getattr(error, "failures", None)
    if failures is None:
        raise DataError(f"{what}: {error}; {remedy}") from error
    if not failures:
        raise DataError(f"{what}; {remedy}") from OnOtherRank("the rank that gathers the results knows why")
    rank, (reason, _) = min(failures.items())
    raise DataError(f"{what}: rank {rank}: {reason}; {remedy}") from error
