"""A Hugging Face folder, looked at before anything is started: what is wrong with it would surface minutes later, and
on some ranks only. Reads config.json and the headers of the safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sglang.errors import DataError
from megatron_sglang.hf_files import EXPERTS, read_header

Shapes = dict[str, tuple[int, ...]]


def check(hf_path: str, *, weights: bool) -> None:
    """DataError for a folder without readable config.json and, with `weights`, for safetensors files that are missing,
    cut off, or of another model than config.json."""
    folder = Path(hf_path)
    if not (folder / "config.json").is_file():
        raise DataError(f"model.hf_path={hf_path} has no config.json; give a folder in Hugging Face format")
    config = _json_object(folder / "config.json")
    if weights:
        shapes: Shapes = {}
        for path in _weight_files(folder):
            shapes |= _header(path)
        _compare(config.get("text_config", config), shapes, folder)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a JSON {type(found).__name__}, expected an object; fetch the file again")
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (files := sorted(folder.glob("*.safetensors"))):
            raise DataError(f"model.hf_path={folder} has no .safetensors file; only safetensors weights are read")
        return files
    files = sorted({folder / name for name in _json_object(index).get("weight_map", {}).values()})
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(f"{folder} lacks {len(missing)} files of {index.name}, {missing[0]} first; fetch them")
    return files


def _header(path: Path) -> Shapes:
    """Name -> shape, of a file that is not cut off."""
    entries, expected = read_header(path)
    if (size := path.stat().st_size) != expected:
        raise DataError(f"{path} has {size} bytes, its header says {expected}; fetch the file again")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _compare(config: Mapping[str, Any], shapes: Shapes, folder: Path) -> None:
    """Sizes that the names and shapes of the usual layout tell; what they do not tell, Bridge finds when it loads."""
    layers = config.get("num_hidden_layers", 0) + config.get("num_nextn_predict_layers", 0)
    embedding = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    found = {
        "num_hidden_layers": (_count(r"\blayers\.(\d+)\.", shapes), {config.get("num_hidden_layers"), layers}),
        "vocab_size": (embedding and embedding[0], {config.get("vocab_size")}),
        "hidden_size": (embedding and embedding[1], {config.get("hidden_size")}),
    }
    for name in EXPERTS:
        if name in config:
            found[name] = (_count(r"\bexperts\.(\d+)\.", shapes), {config[name]})
    for name, (in_weights, allowed) in found.items():
        if in_weights is not None and in_weights not in allowed:
            raise DataError(
                f"config.json in {folder} says {name}={config.get(name)}, the weights have {in_weights}; "
                "they are of different models: fetch the folder again"
            )


def _count(pattern: str, shapes: Shapes) -> int | None:
    """Highest number that `pattern` finds in the names, plus one; None where it finds none."""
    numbers = [int(match[1]) for name in shapes if (match := re.search(pattern, name))]
    return max(numbers) + 1 if numbers else None
