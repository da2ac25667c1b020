"""A Hugging Face model folder while it is written: shard by shard, so that an interrupted conversion can be continued.

Beside its place, as `.NAME.partial`, until it is complete:

    part-00001 ...      finished shards, and maybe one that is not
    .conversion.json    which shards are finished, with size and SHA-256, and what they are made of

A shard counts from the moment that the record names it. Continuing reads every finished shard once; one that is not
what the record says is written again. Torch and safetensors only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_sglang.errors import DataError
from megatron_sglang.hf_files import tensor_entries
from megatron_sglang.weights.progress import progress
from megatron_sglang.weights.write import RECORD, locked, partial_name, require_new, save_tensors

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard, in `file`, or still in `part` where its renaming was interrupted."""

    file: str
    part: str
    nbytes: int
    sha256: str


def state_of_files(folder: Path) -> str:
    """A digest of names, sizes and times of the files in a folder: changes when one of them is written again."""
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def require_continuable(target: Path, source: Mapping[str, str]) -> None:
    """DataError if `target` is there, or if an unfinished conversion to it is one of something else than `source`."""
    require_new(target)
    partial = partial_name(target)
    stored = _read_record(partial)
    if stored is None:
        return
    odd = [name for name, value in source.items() if stored[0].get(name) != value]
    if odd:
        raise DataError(
            f"{partial} is an unfinished conversion with another {odd[0]}: {stored[0].get(odd[0])}, "
            f"asked for {source[odd[0]]}; give the arguments of then, remove it, or name another folder"
        )


@contextlib.contextmanager
def continued(target: Path, source: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> Iterator[ShardFolder]:
    """Yield the folder that becomes `target` at the end, with the shards that an interrupted call had finished.

    source: what is converted, by what it is called in an error; another one's shards are refused. When an error passes,
    finished shards stay for the next call; but not after a DataError, which it would end in as well.
    """
    require_continuable(target, source)
    partial, target = partial_name(target), Path(os.path.abspath(target))  # "." cannot be replaced by that name
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            folder = ShardFolder(partial, source, shard_bytes)
            try:
                yield folder
                partial.rename(target)
                (target / RECORD).unlink()
            except DataError:
                folder.shards.clear()
                raise
            except BaseException as error:
                if folder.shards:
                    error.add_note(f"{len(folder.shards)} finished shards stay in {partial}; the same command goes on")
                raise
            finally:
                if not folder.shards:
                    shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{target} cannot be written: {error}; make room and give the same command again, which goes on where this "
            "one stopped, or name another folder"
        ) from error


class ShardFolder:
    """Named tensors into `model.safetensors`, or into numbered shards with an index where there are several.

    shard_bytes: a shard is closed before it grows past this; the most that is held in memory (a larger tensor aside).
    """

    def __init__(self, path: Path, source: Mapping[str, str], shard_bytes: int) -> None:
        self.path, self.source, self.shard_bytes = path, dict(source), shard_bytes
        self.shards: list[Shard] = []
        self.done: dict[str, int] = {}
        """Name -> bytes of every tensor in a finished shard."""
        self._shard: dict[str, torch.Tensor] = {}
        self._filled = 0
        stored = _read_record(path)
        self._keep(stored[1] if stored else [])
        self._save()

    def extend(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take copies of tensors of any device and stride."""
        for name, tensor in named:
            nbytes = tensor.numel() * tensor.element_size()
            if self._shard and self._filled + nbytes > self.shard_bytes:
                self._write()
            # Memory of its own: safetensors refuses tensors that share some, and views keep their whole storage alive.
            own = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._shard[name] = own.copy_(tensor.detach())
            self._filled += nbytes

    def close(self) -> None:
        """Write the last shard, give all of them their final names, and write the index."""
        self._write()
        count = len(self.shards)
        self.shards = [
            dataclasses.replace(
                shard, file="model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            )
            for number, shard in enumerate(sorted(self.shards, key=lambda shard: shard.part), start=1)
        ]
        self._save()  # first, so that an interruption leaves no shard under a name that nobody knows
        for shard in self.shards:
            (self.path / shard.part).rename(self.path / shard.file)
        if count > 1:
            where = {name: shard.file for shard in self.shards for name in tensor_entries(self.path / shard.file)}
            index = {"metadata": {"total_size": sum(self.done.values())}, "weight_map": dict(sorted(where.items()))}
            (self.path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        if not self._shard:
            return
        taken = {shard.part for shard in self.shards}
        part = next(part for number in range(1, len(taken) + 2) if (part := f"part-{number:05d}") not in taken)
        path = self.path / part
        save_tensors(self._shard, path)
        self.done |= {name: tensor.nbytes for name, tensor in self._shard.items()}
        self._shard, self._filled = {}, 0
        self.shards.append(Shard(part, part, path.stat().st_size, _digest(path)))
        self._save()

    def _keep(self, stored: list[Shard]) -> None:
        """Of the shards of an interrupted call those that are whole; everything else is removed."""
        total = sum(shard.nbytes for shard in stored)
        with progress("checking finished shards", total) if stored else contextlib.nullcontext() as checked:
            for shard in stored:
                part, final = self.path / shard.part, self.path / shard.file
                if not _is_whole(part, shard):
                    if not _is_whole(final, shard):
                        continue
                    final.rename(part)
                self.shards.append(dataclasses.replace(shard, file=shard.part))
                offsets = {name: entry["data_offsets"] for name, entry in tensor_entries(part).items()}
                self.done |= {name: end - begin for name, (begin, end) in offsets.items()}
                if checked is not None:
                    checked(shard.nbytes)
        kept = {RECORD, *(shard.part for shard in self.shards)}
        for path in self.path.iterdir():
            if path.name not in kept:
                path.unlink()

    def _save(self) -> None:
        record = {"source": self.source, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        new = self.path / f"{RECORD}.new"
        new.write_text(json.dumps(record, indent=2) + "\n")
        new.rename(self.path / RECORD)  # whole or not at all


def _read_record(partial: Path) -> tuple[dict[str, str], list[Shard]] | None:
    """What an unfinished conversion is of, and its finished shards; None: there is none that could be continued."""
    try:
        record = json.loads((partial / RECORD).read_text())
        return dict(record["source"]), [Shard(**shard) for shard in record["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.nbytes and _digest(path) == shard.sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
