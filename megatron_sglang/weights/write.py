"""Write a Hugging Face folder: single files, and a place where nothing is to be seen before all of it is there.

Torch and safetensors only. Weights in shards: `shard_folder.py`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_sglang.errors import DataError
from megatron_sglang.hf_files import PREDICTION_COUNTS

RECORD = ".conversion.json"
"""File of `shard_folder.ShardFolder` in a folder that it has not completed: says which shards are finished."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_COPIED = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".py"}
"""Suffixes of what a model folder holds besides weights: configuration, tokenizer, chat template, custom code."""


def require_new(folder: Path) -> None:
    """DataError unless `folder` is absent or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise DataError(
            f"{folder} exists and is not an empty folder; nothing is overwritten, name another or remove it"
        )


def partial_name(folder: Path) -> Path:
    """Where `folder` is written until it is complete; the same on every rank."""
    folder = Path(os.path.abspath(folder))  # "." has no name
    if not folder.name:
        raise DataError(f"{folder} is no name for a new folder; name a folder inside of it")
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """DataError if another process writes to `folder`. Where the file system has no locks, nothing is checked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder} is being written by another process; wait for it, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it becomes `folder` at the end, or is removed when an error passes."""
    require_new(folder)
    partial = partial_name(folder)
    folder = Path(os.path.abspath(folder))
    if (partial / RECORD).exists():
        raise DataError(
            f"{partial} is an unfinished conversion of a model; nothing of it is overwritten, "
            "finish it by the command that it was started with, remove it, or name another folder"
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            try:
                _clear(partial)
                yield partial
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be written: {error}; make room or name another folder") from error


def _clear(folder: Path) -> None:
    """Remove what a killed process left in `folder`; not the folder itself, which is locked."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file, with the read and write permissions of its folder: safetensors gives them to the
    owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_tensors(folder: Path, names: Collection[str], dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a model folder's files in `dtype`, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(names).intersection(file.keys())):
                yield name, file.get_tensor(name).to(getattr(torch, dtype))


class TensorFile:
    """A safetensors file that takes its tensors one by one, in any order, so that none of them is held.

    shapes: of every tensor, by name. A tensor that is not put is zeros.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
        self._entries, self._start = header, 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of any device and stride to its place."""
        entry = self._entries[name]
        if list(tensor.shape) != entry["shape"] or tensor.dtype != self.dtype:
            raise DataError(
                f"{self._file.name}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"announced were {self.dtype} {entry['shape']}; export it again"
            )
        self._file.seek(self._start + entry["data_offsets"][0])
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()


def copy_all_but_weights(source: Path, target: Path, dtype: str, *, predicts: bool = True) -> None:
    """Copy configuration and tokenizer files; config.json names `dtype`, so that loaders do not cast. predicts: False
    where layers for multi-token prediction were not written: config.json counts none."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    changed = config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    if not predicts:
        changed |= {name: 0 for name in PREDICTION_COUNTS if config.get(name)}
    if changed != config:
        (target / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
