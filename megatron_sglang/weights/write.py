"""Write a Hugging Face folder: weights in shards, the other files copied, nothing to be seen before all of it is there.

Torch and safetensors only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_sglang.errors import DataError

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
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
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it becomes `folder` at the end, or is removed when an error passes."""
    require_new(folder)
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be written: {error}; make room or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One safetensors file, readable by whom its folder is; safetensors itself makes it the owner's alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


class ShardWriter:
    """Named tensors into `model.safetensors`, or into numbered shards with an index where there are several.

    shard_bytes: a shard is closed before it grows past this; the most that is held in memory (a larger tensor aside).
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._filled = self._total = 0
        self._names: list[list[str]] = []

    def extend(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take copies of tensors of any device and stride."""
        for name, tensor in named:
            self._add(name, tensor)

    def close(self) -> None:
        """Write the last shard, give all of them their final names, and write the index."""
        self._write()
        count = len(self._names)
        where: dict[str, str] = {}
        for number, names in enumerate(self._names, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / final)
            where |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        if self._shard and self._filled + nbytes > self.shard_bytes:
            self._write()
        # A clone of its own: safetensors refuses tensors that share memory, and views keep their whole storage alive.
        self._shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._filled += nbytes
        self._total += nbytes

    def _write(self) -> None:
        if not self._shard:
            return
        self._names.append(list(self._shard))
        save_tensors(self._shard, self._path(len(self._names)))
        self._shard, self._filled = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"


def copy_all_but_weights(source: Path, target: Path, dtype: str) -> None:
    """Copy configuration and tokenizer files; config.json names `dtype`, so that loaders do not cast."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        (target / "config.json").write_text(json.dumps(config | {key: dtype}, indent=2) + "\n")
