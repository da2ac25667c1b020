"""Text that files and tokenizers take."""

from __future__ import annotations

HALF_PAIRS = "backslashreplace"
"""UTF-8 has no form for half a surrogate pair; so it becomes \\udc80, which JSON reads as what it was."""


def encodable(text: str) -> str:
    """Half a surrogate pair, which a model or its program may write, as its escape."""
    return text.encode(errors=HALF_PAIRS).decode()
