"""A communicator without process groups, for tests of what ranks do together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class Alone:
    """`interfaces.Comm` of a single rank."""

    rank, world_size = 0, 1

    def from_leader(self, produce: Callable[[], Any]) -> Any:
        return json.loads(json.dumps(produce()))

    def agree(self, error: BaseException | None) -> None:
        if error is not None:
            raise error

    def gather(self, value: Any) -> list[Any]:
        return [value]
