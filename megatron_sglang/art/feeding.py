"""The giving end of a run's feed (`feed/`)."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any, Self

from megatron_sglang.errors import DataError, EngineDiedError
from megatron_sglang.feed.batch import Wanted
from megatron_sglang.unix_socket import short_name

POLL_S = 0.1
_LIMIT = 1 << 20
"""Of one line from the run."""


class Feeding:
    """A connection to a run that waits for batches. Raises `EngineDiedError` when the run is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._wanted: Wanted | None = None

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Connect as soon as the run listens; waits for ever."""
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                with short_name(path) as name:
                    connection.connect(name)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                await asyncio.sleep(POLL_S)
                continue
            return cls(*await asyncio.open_unix_connection(sock=connection, limit=_LIMIT))

    async def wanted(self) -> Wanted:
        """The batch the run waits for, once it does."""
        while self._wanted is None:
            await self._receive()
        return self._wanted

    async def give(self, groups: list[list[dict[str, Any]]], learning_rate: float | None) -> None:
        """Hand over the batch that is wanted. `DataError` with the run's reason if it refuses."""
        wanted = await self.wanted()
        message = {"batch": wanted.batch, "learning_rate": learning_rate, "groups": groups}
        line = json.dumps(message, allow_nan=False).encode() + b"\n"
        if len(line) > wanted.limit_bytes:
            raise DataError(f"a batch of {len(line):,} bytes; the run takes at most {wanted.limit_bytes:,}: split it")
        self._wanted = None
        try:
            self._writer.write(line)
            await self._writer.drain()
        except ConnectionError as error:
            raise EngineDiedError(f"the training run does not take batches any more: {error!r}") from error
        while True:
            reply = await self._receive()
            if "refused" in reply:
                self._wanted = wanted
                raise DataError(str(reply["refused"]))
            if reply.get("accepted") == wanted.batch:
                self._wanted = None
                return

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError) as error:
            raise EngineDiedError(f"the training run's feed broke: {error!r}") from error
        if not line.endswith(b"\n"):
            raise EngineDiedError("the training run has closed its feed")
        message = json.loads(line)
        if "ready" in message:
            # It also comes again for the same batch, after the engine had to be started anew.
            self._wanted = Wanted(**message["ready"])
        return message

    async def close(self) -> None:
        """The run ends when it next waits for a batch."""
        self._writer.close()
