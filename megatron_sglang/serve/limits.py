"""What one endpoint lets its clients do. Everything that a client sends or holds has a bound."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_sglang.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for `*_s`, bytes for `*_bytes`. They are the command's options too: --max-tokens 1024 and so on."""

    max_tokens: int = 32768
    """Sampled tokens of one choice."""
    max_choices: int = 128
    """Choices of one request: prompts x n."""
    max_top_logprobs: int = 20
    concurrency: int = 1024
    """Choices that are in the engine at the same time."""
    queue: int = 16384
    """Requests that wait for their turn; a further one is told to come again (429)."""
    body_bytes: int = 8 << 20
    """Of one request."""
    bodies_bytes: int = 1 << 30
    """Of all requests that are being read or served."""
    head_s: float = 10.0
    """To send a request's line and headers."""
    body_s: float = 30.0
    """To send a request's body."""
    write_s: float = 30.0
    """To take a part of the answer."""
    request_s: float = 600.0
    """From a complete request to its complete answer, waiting in the queue included."""
    hold_s: float = 30.0
    """How long a request that is under way may wait for an engine that has stopped serving."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f"--{field.name.replace('_', '-')}={getattr(self, field.name)} must be more than 0")
        if self.max_choices > self.concurrency:
            raise ConfigError(
                f"--max-choices={self.max_choices} is more than --concurrency={self.concurrency}, so that such a "
                "request could never start; lower it"
            )
