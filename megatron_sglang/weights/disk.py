"""Merged weights as a Hugging Face folder, one for each version: RUN/weights/v000012 (format: `weight_folder.py`).

Every rank sees every bucket (`export.py`) and writes each n-th of them, so n ranks write at the same time and none
holds more than one bucket. A folder has its name from the moment that it is complete and on the disk; only the last
ones stay. The folder must be on a file system that all ranks and engines see.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_sglang.buckets import Bucket
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.interfaces import Comm, Weights
from megatron_sglang.sync import agreed
from megatron_sglang.sync_methods import Folder
from megatron_sglang.types import MergeFidelity
from megatron_sglang.weight_folder import Part, write_manifest
from megatron_sglang.weights.shard_folder import INDEX
from megatron_sglang.weights.write import TensorFile, copy_all_but_weights

KEPT = 2
"""Folders that stay: the last one, which an engine may have to be started on, and the one before it."""


class FolderHome:
    """A folder of folders, each of which appears whole. Used by the leader only.

    prefix: of the names that are its own; others in the same place are never touched.
    """

    def __init__(self, home: Path, prefix: str) -> None:
        self.home, self.prefix = home, prefix

    def open(self, name: str) -> Path:
        """An empty folder that becomes `name` in `close`; what an earlier run left unfinished goes."""
        with self.failing_as(name):
            self.home.mkdir(parents=True, exist_ok=True)
            for left in self.home.glob(f".{self.prefix}*.partial"):
                shutil.rmtree(left)
            partial = self._partial(name)
            partial.mkdir()
            return partial

    def close(self, name: str) -> Path:
        """Everything on the disk, then under its name; older folders than the last `KEPT` are removed."""
        partial, target = self._partial(name), self.home / name
        with self.failing_as(name):
            for path in (*partial.iterdir(), partial):
                _to_disk(path)
            if target.exists():  # a version that is published once more, after a failure or a restart of the run
                shutil.rmtree(target)
            partial.rename(target)
            _to_disk(self.home)
            for old in self._finished()[:-KEPT]:
                shutil.rmtree(old)
        return target

    def give_up(self, name: str) -> None:
        """Remove what was written since `open`."""
        shutil.rmtree(self._partial(name), ignore_errors=True)

    def _finished(self) -> list[Path]:
        """Its complete folders, oldest first."""
        own = (path for path in self.home.glob(f"{self.prefix}*") if path.is_dir())
        return sorted(own, key=lambda path: path.stat().st_mtime_ns)

    def _partial(self, name: str) -> Path:
        return self.home / f".{name}.partial"

    @contextlib.contextmanager
    def failing_as(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.give_up(name)
            text = f"{self.home / name} cannot be written: {error}; make room and publish again"
            raise WeightSyncError(text) from error


class DiskWriter:
    """Writes versions as folders in `home` (`sync_methods.FolderWriter`). All ranks call together.

    source: folder of the base model, for configuration and tokenizer. name: of a version's folder, to be formatted.
    """

    def __init__(
        self, comm: Comm, weights: Weights, home: Path, source: Path, dtype: str, *, name: str = "v{version:06}"
    ) -> None:
        self.comm, self.weights, self.source, self.dtype, self.name = comm, weights, source, dtype, name
        self.home = FolderHome(home, name.partition("{")[0])

    def write(self, version: int) -> Folder:
        """Raises `WeightSyncError` on all ranks, and leaves nothing, if the folder cannot be written whole."""
        name = self.name.format(version=version)
        partial = Path(self.comm.from_leader(lambda: str(self.home.open(name))))
        parts: list[Part] = []
        try:
            for part in agreed(self.comm, self._parts(version, partial)):
                parts.append(part)
            done = self.comm.from_leader(lambda: asdict(self._finish(name, partial, parts)))
        except WeightSyncError:
            if self.comm.rank == 0:
                self.home.give_up(name)
            raise
        return Folder(**done)

    def fidelity(self) -> MergeFidelity:
        return self.weights.fidelity()

    def _parts(self, version: int, partial: Path) -> Iterator[Part]:
        for bucket in self.weights.buckets(version):
            path = partial / f"model-{bucket.index:05}.safetensors"
            mine = bucket.index % self.comm.world_size == self.comm.rank
            try:
                start = _write(bucket, path) if mine else 0
            except (OSError, SafetensorError) as error:
                raise WeightSyncError(f"{path} cannot be written: {error}; make room and publish again") from error
            yield Part(path.name, start, sum(spec.nbytes for spec in bucket.specs), _without_gaps(bucket).header())

    def _finish(self, name: str, partial: Path, parts: list[Part]) -> Folder:
        """On the leader, when all ranks have written."""
        where, whole = {}, []
        for part in parts:
            path = partial / part.file
            if not path.exists():
                raise WeightSyncError(
                    f"{path} is not there, though another rank has written it; log.run_dir must be on a file system "
                    "that all nodes share"
                )
            whole.append(replace(part, start=path.stat().st_size - part.nbytes))
            where |= {spec["name"]: part.file for spec in json.loads(part.header)["specs"]}
        size = sum(part.nbytes for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        with self.home.failing_as(name):
            (partial / INDEX).write_text(json.dumps(index) + "\n")
            copy_all_but_weights(self.source, partial, self.dtype, predicts=False)
            manifest = write_manifest(partial, whole)
        return Folder(str(self.home.close(name)), manifest, tensors=len(where), files=len(parts), bytes=size)


def _write(bucket: Bucket, path: Path) -> int:
    """A safetensors file of a bucket, on the disk; where its data begins."""
    dtypes = {tensor.dtype for _, tensor in bucket.tensors()}
    assert len(dtypes) == 1, f"weights of one version have {len(dtypes)} dtypes"
    file = TensorFile(path, {spec.name: spec.shape for spec in bucket.specs}, dtypes.pop())
    try:
        for name, tensor in bucket.tensors():
            file.put(name, tensor)
    finally:
        file.close()
    _to_disk(path)
    return path.stat().st_size - sum(spec.nbytes for spec in bucket.specs)


def _without_gaps(bucket: Bucket) -> Bucket:
    """The bucket with the offsets that its tensors have in the file, where nothing is aligned to 16 bytes."""
    specs: list[Any] = []
    end = 0
    for spec in bucket.specs:
        specs.append(replace(spec, offset=end))
        end += spec.nbytes
    return replace(bucket, specs=tuple(specs))


def _to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
