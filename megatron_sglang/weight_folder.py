"""Weights on disk, as the sync methods `disk` and `restart` hand them over: a Hugging Face folder that proves itself.

    v000012/
        config.json, tokenizer, ...     of the base model
        model-00000.safetensors ...     one bucket each: never half of what an engine fuses
        model.safetensors.index.json    so that every reader of such folders finds each tensor
        manifest.json                   of each file where its data starts, and each tensor's place and digest

A reader that is told the manifest's own SHA-256 trusts nothing else. Torch only; both rooms know it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_sglang.buckets import Bucket

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One file: its data begins at byte `start` and is that of the bucket with this header (`Bucket.header`)."""

    file: str
    start: int
    nbytes: int
    header: str


def write_manifest(folder: Path, parts: Sequence[Part]) -> str:
    """Write the manifest; its SHA-256."""
    text = json.dumps({"parts": [asdict(part) for part in parts]}).encode()
    (folder / MANIFEST).write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def read_manifest(folder: Path, sha256: str) -> list[Part]:
    """ValueError if it cannot be read or is not the one with this digest."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error}); publish again") from error
    found = hashlib.sha256(text).hexdigest()
    if found != sha256:
        raise ValueError(f"{folder / MANIFEST} has SHA-256 {found}, its writer said {sha256}; publish again")
    return [Part(**part) for part in json.loads(text)["parts"]]


def buckets(folder: Path, sha256: str) -> Iterator[Bucket]:
    """The buckets of a folder, one held at a time, their digests still to be checked. ValueError: a file is short."""
    for part in read_manifest(folder, sha256):
        yield Bucket.from_header(part.header, _read(folder / part.file, part))


def _read(path: Path, part: Part) -> torch.Tensor:
    data = torch.empty(part.nbytes, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(part.start)
            got = file.readinto(data.numpy().data)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); publish again") from error
    if got != part.nbytes:
        raise ValueError(f"{path} ends after {got} of {part.nbytes} bytes of weights; publish again")
    return data
