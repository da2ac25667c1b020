"""What the files of a Hugging Face folder say. Reads no weights; the standard library only.

*.safetensors   8 bytes of header length (little endian), header as JSON, data; names, shapes, types and places are in
                the header
config.json     how many experts a layer has, whose name differs between families of models
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sglang.errors import DataError

ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""Bytes of one element, by the names that our options use."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names under which config.json counts the routed experts of a layer."""
PREDICTION_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Where config.json says how many layers for multi-token prediction there are."""
_LAYER = re.compile(r"(?:model\.|language_model\.)+layers\.(\d+)\.")
_APART = ("mtp.", "model.mtp_layers.")
"""What the names of such layers begin with, where they are not numbered on from the model's own."""


def count_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer by this config.json; 0 of a dense model."""
    return next((config[name] for name in EXPERTS if config.get(name)), 0)


def tensor_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape", "data_offsets": [begin, end] in bytes} of one file. DataError if it has no header."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The same, and how many bytes the whole file must have."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length if length < path.stat().st_size else 0))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return entries, 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, OSError, AttributeError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"{path} has no readable safetensors header ({error}); fetch the file again") from error


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor of the model in a folder's safetensors files; empty without files. DataError as
    above. Without layers for multi-token prediction, which neither trainer nor engine have."""
    return _shapes(folder, predicting=False)


def prediction_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The others: of its layers for multi-token prediction (GLM-4.5, DeepSeek-V3), which guess tokens further ahead for
    speculative decoding and stand behind the model's own layers, or apart from it."""
    return _shapes(folder, predicting=True)


def _shapes(folder: str | Path, *, predicting: bool) -> dict[str, tuple[int, ...]]:
    folder, shapes = Path(folder), dict[str, tuple[int, ...]]()
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {name: tuple(entry["shape"]) for name, entry in tensor_entries(path).items()}
    layers = _model_layers(folder)
    return {name: shape for name, shape in shapes.items() if _predicts(name, layers) == predicting}


def _predicts(name: str, layers: int) -> bool:
    """layers: those of the model itself."""
    found = _LAYER.match(name)
    return int(found[1]) >= layers if found else name.startswith(_APART)


def _model_layers(folder: Path) -> int:
    """How many decoder layers the model has that stand before others; more than there can be, if none do."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        return int(config["num_hidden_layers"]) if any(config.get(name) for name in PREDICTION_COUNTS) else sys.maxsize
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return sys.maxsize
