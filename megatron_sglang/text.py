"""Text that files and tokenizers take, and what an error quotes of a long one."""

from __future__ import annotations

HALF_PAIRS = "backslashreplace"
"""UTF-8 has no form for half a surrogate pair; so it becomes \\udc80, which JSON reads as what it was."""
LOG_LINES = 20


def encodable(text: str) -> str:
    """Half a surrogate pair, which a model or its program may write, as its escape."""
    return text.encode(errors=HALF_PAIRS).decode()


def last_lines(log: str) -> str:
    """What an error quotes of a log."""
    return "\n".join(log.splitlines()[-LOG_LINES:])
