"""A store for ranks to meet in, on one address. The one that rank 0 would make listens on all interfaces, without a
key, and on a port that may have been taken since it was chosen."""

from __future__ import annotations

import datetime
import os
import socket

from torch.distributed import TCPStore

AGENT_STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
"""What tells torch, in the way of torchrun, that the store at MASTER_ADDR exists; otherwise rank 0 would make one."""


def open_store(address: str, timeout_s: float = 300.0) -> tuple[TCPStore, int]:
    """A store that listens on `address` alone, and its port. timeout_s: of what waits in it."""
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        store = TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
            master_listen_fd=os.dup(listener.fileno()),
        )
    return store, port
