"""Python literals over a socket, decoded without running anything the sender wrote.

None, bool, str, int, float (inf, nan), list are themselves in JSON; every other kind is an object with one key:
`{"tuple": [...]}`, `{"dict": [[key, value], ...]}`, `{"set": [...]}`, `{"bytes": hex}`, `{"complex": [re, im]}`, ...
A value of a subclass travels as its builtin base, so no `__eq__` of the sender survives. A frame is a 4-byte
big-endian length and that much JSON.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}
BASES: tuple[Any, ...] = (int, float, str, list, tuple, set, frozenset, dict, bytes, complex)
HEADER = struct.Struct(">I")
JOB_BYTES = 16 << 20
"""The largest message between a box and its driver."""


class ChannelError(Exception):
    """The other side is gone, too slow, or does not speak this protocol."""


class TooLarge(ChannelError):
    """The message is over the limit; nothing of it was sent."""


def pack(value: Any) -> Any:
    """The JSON form of a literal; `TypeError` if it is none, `RecursionError` if it contains itself."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:  # hex has no limit on digits
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if kind is list:
        return [pack(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [pack(item) for item in value]}
    if kind is dict:
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    for base in BASES:
        if isinstance(value, base):
            return pack(base(value))
    raise TypeError(f"a value of type {kind.__name__} is not a literal")


def unpack(form: Any) -> Any:
    """The value of a JSON form; `ChannelError` if it is malformed."""
    if isinstance(form, list):
        return [unpack(item) for item in form]
    if not isinstance(form, dict):
        return form
    try:
        ((tag, body),) = form.items()
        if tag in CONTAINERS:
            return CONTAINERS[tag](unpack(item) for item in body)
        if tag == "dict":
            return {unpack(key): unpack(item) for key, item in body}
        if tag == "int":
            return int(body, 16)
        if tag in ("bytes", "bytearray"):
            return bytes.fromhex(body) if tag == "bytes" else bytearray.fromhex(body)
        if tag == "complex":
            return complex(*body)
    except (TypeError, ValueError, AttributeError) as error:
        raise ChannelError(f"malformed literal: {error}") from None
    raise ChannelError(f"unknown kind of literal {tag[:20]!r}")


def same(value: Any, expected: Any) -> bool:
    """Equal in type and value, all the way down; nan equals nan, order matters in sequences only."""
    kind = type(expected)
    if type(value) is not kind:
        return False
    if kind in (list, tuple):
        return len(value) == len(expected) and all(map(same, value, expected))
    if kind is dict:
        mine, theirs = ({_text(key): item for key, item in side.items()} for side in (value, expected))
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in theirs)
    if kind in (set, frozenset):
        return {_text(item) for item in value} == {_text(item) for item in expected}
    if kind is complex:
        return same(value.real, expected.real) and same(value.imag, expected.imag)
    return bool(value == expected) or (kind is float and value != value and expected != expected)


def _text(value: Any) -> str:
    """A key that tells 1 from True and 1.0; items of a nested set come in a fixed order."""
    if isinstance(value, frozenset):
        return "frozenset(" + ",".join(sorted(map(_text, value))) + ")"
    if isinstance(value, tuple):
        return "tuple(" + ",".join(map(_text, value)) + ")"
    return json.dumps(pack(value))


def send(channel: socket.socket, message: Any, limit: int) -> None:
    """Write one frame; `TooLarge` if it has more than `limit` bytes, `ChannelError` if nobody listens."""
    frame = framed(message, limit)
    try:
        channel.sendall(frame)
    except OSError as error:
        raise ChannelError(str(error)) from None


def framed(message: Any, limit: int) -> bytes:
    """`message` as it travels; `TooLarge` if it has more than `limit` bytes."""
    body = json.dumps(message).encode()
    if len(body) > limit:
        raise TooLarge(f"a message of {len(body)} bytes is over the limit of {limit}")
    return HEADER.pack(len(body)) + body


def receive(channel: socket.socket, limit: int) -> Any:
    """Read one frame of at most `limit` bytes; `ChannelError` on end of file, timeout or nonsense."""
    (size,) = HEADER.unpack(_exactly(channel, HEADER.size))
    if size > limit:
        raise ChannelError(f"a message of {size} bytes is over the limit of {limit}")
    try:
        return json.loads(_exactly(channel, size))
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"not JSON: {error}") from None


def _exactly(channel: socket.socket, size: int) -> bytes:
    body = bytearray()
    while len(body) < size:
        try:
            part = channel.recv(min(size - len(body), 1 << 16))
        except OSError as error:  # TimeoutError is one
            raise ChannelError("timeout" if isinstance(error, TimeoutError) else str(error)) from None
        if not part:
            raise ChannelError("closed")
        body += part
    return bytes(body)
