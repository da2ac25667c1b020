"""megatron_sglang/store.py: the store is where it was asked for, and a rank that is told of it makes no other."""

from __future__ import annotations

import os

import psutil
import pytest
import torch.distributed as dist

from megatron_sglang.store import AGENT_STORE, open_store


def listening() -> dict[int, str]:
    """Ports that this process listens on, and the address of each."""
    found = psutil.Process().net_connections("tcp")
    return {one.laddr.port: one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def test_a_rank_meets_in_the_store_and_opens_none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, on all interfaces: anyone on the network could change what ranks tell each other."""
    before = listening()
    store, port = open_store("127.0.0.1", timeout_s=20.0)
    assert listening().items() - before.items() == {(port, "127.0.0.1")}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **AGENT_STORE}
    for name, value in alone.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    try:
        dist.barrier()
        assert set(listening().values()) - set(before.values()) <= {"127.0.0.1"}
    finally:
        dist.destroy_process_group()
    del store
    assert port not in listening()
