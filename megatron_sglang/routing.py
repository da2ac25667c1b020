"""The experts that an engine chose, as they travel: narrowed, joined and cut. No torch.

    SGLang's answer   base64 of int32 [tokens, layers, top_k]
    RoutedExperts     uint8 [tokens, layers, top_k], or uint16 where an expert's number is above 255
    a checkpoint      JSON of them (`json_values`): base64 again

Numbers are little-endian.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sglang.errors import EngineError
from megatron_sglang.types import RoutedExperts


def of_engine(text: str, tokens: int) -> RoutedExperts:
    """SGLang's answer for so many tokens. `EngineError` where it is of another size, or names no expert."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise EngineError(f"engine returned routed experts that are not base64: {error}") from None
    numbers = len(raw) // 4
    if tokens < 0 or len(raw) % 4 or (numbers % tokens if tokens else numbers):
        raise EngineError(
            f"engine returned {len(raw)} bytes of routed experts for {tokens} tokens; expected as many int32 for each"
        )
    low, high = raw[::4], raw[1::4]
    if any(part.count(0) != numbers for part in (raw[2::4], raw[3::4])):
        raise EngineError("engine returned routed experts outside 0 .. 65535; expected the numbers of experts")
    if high.count(0) == numbers:
        return RoutedExperts(tokens, 1, low)
    return RoutedExperts(tokens, 2, _interleaved(low, high))


def joined(parts: Iterable[RoutedExperts | None]) -> RoutedExperts | None:
    """One after the other; None of nothing."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    width = max(part.width for part in found)
    return RoutedExperts(sum(part.tokens for part in found), width, b"".join(_bytes(part, width) for part in found))


def json_values(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """`dict_factory` of `dataclasses.asdict` for records that hold `RoutedExperts`."""
    return {name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in items}


def from_json(row: Mapping[str, Any] | None) -> RoutedExperts | None:
    """Inverse of `json_values`; None of None."""
    return None if row is None else RoutedExperts(row["tokens"], row["width"], base64.b64decode(row["data"]))


def _bytes(routed: RoutedExperts, width: int) -> bytes:
    return routed.data if width == routed.width else _interleaved(routed.data, bytes(len(routed.data)))


def _interleaved(low: bytes, high: bytes) -> bytes:
    wide = bytearray(2 * len(low))
    wide[::2], wide[1::2] = low, high
    return bytes(wide)
