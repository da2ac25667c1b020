"""The experts that an engine chose, as they travel: narrowed, joined and cut. No torch.

    SGLang's answer   base64 of int32 [tokens, layers, top_k]
    RoutedExperts     base64 of uint8 [tokens, layers, top_k], or uint16 where an expert's number is above 255

Base64 and not bytes because samples, checkpoints and messages are JSON. Numbers are little-endian.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

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
        return _packed(tokens, 1, low)
    return _packed(tokens, 2, _interleaved(low, high))


def joined(parts: Iterable[RoutedExperts | None]) -> RoutedExperts | None:
    """One after the other; None of nothing."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    width = max(part.width for part in found)
    return _packed(sum(part.tokens for part in found), width, b"".join(_bytes(part, width) for part in found))


def int16_bytes(routed: RoutedExperts) -> bytes:
    """[tokens, layers, top_k] as int16."""
    return _bytes(routed, 2)


def _packed(tokens: int, width: int, data: bytes) -> RoutedExperts:
    return RoutedExperts(tokens, width, base64.b64encode(data).decode())


def _bytes(routed: RoutedExperts, width: int) -> bytes:
    data = base64.b64decode(routed.data)
    return data if width == routed.width else _interleaved(data, bytes(len(data)))


def _interleaved(low: bytes, high: bytes) -> bytes:
    wide = bytearray(2 * len(low))
    wide[::2], wide[1::2] = low, high
    return bytes(wide)
