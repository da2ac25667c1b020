"""SGLang's stock route from the trainer's end: a real gloo group, whose other end does what an engine rank does.

That a real SGLang meets us there is tests/cpu_e2e/test_modes_sglang.py's.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_sglang.buckets import pack
from megatron_sglang.engine import EngineOptions, stock
from megatron_sglang.engine.http import Http
from megatron_sglang.errors import WeightSyncError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Rank(ThreadingHTTPServer):
    """One engine rank: joins as SGLang's init_custom_process_group does, and keeps what is broadcast to it, and what it
    reads from a folder."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.held: dict[str, torch.Tensor] = {}
        self.read: dict[str, torch.Tensor] = {}
        self.group: Any = None

    def answer(self, path: str, body: dict[str, Any]) -> None:
        wait = datetime.timedelta(seconds=20)
        if path == "/init_weights_update_group":
            address, port = body["master_address"], body["master_port"]
            store: Any = dist.TCPStore(address, port, body["world_size"], is_master=False, timeout=wait)
            for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
                store = dist.PrefixStore(prefix, store)
            self.group = dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], wait)
            return
        if path == "/update_weights_from_disk":
            for file in Path(body["model_path"]).glob("*.safetensors"):
                self.read |= load_file(file)
            return
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            options = dist.BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([tensor], options).wait()
            self.held[name] = tensor


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Rank)
        self.server.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def rank() -> Iterator[Rank]:
    with Rank() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def update(rank: Rank) -> Iterator[stock.StockUpdate]:
    http = Http(rank.server_address[1], "user", "admin", lambda: None)
    options = EngineOptions("m", dtype="float32", update_timeout_s=20.0)
    found = stock.StockUpdate(http, options, "127.0.0.1")
    yield found
    found.close()
    http.close()


def send(update: stock.StockUpdate, *buckets: dict[str, torch.Tensor]) -> None:
    update.begin()
    for index, named in enumerate(buckets):
        update.load(pack(1, index, list(named.items())))
    update.commit(len(buckets))


def test_tensors_arrive_and_the_head_follows_the_embedding(rank: Rank, update: stock.StockUpdate) -> None:
    """SGLang's MoE models ignore tie_word_embeddings: the head of the version before would stay, without an error."""
    for scale in (1.0, 2.0):
        weights = {EMBEDDING: scale * torch.randn(6, 4), "model.norm.weight": scale * torch.ones(4)}
        layer = {"model.layers.0.w": scale * torch.arange(12.0).view(3, 4)}
        send(update, weights, layer)
        for name, tensor in (weights | layer).items():
            assert torch.equal(rank.held[name], tensor)
        assert torch.equal(rank.held[HEAD], weights[EMBEDDING])
    assert not dist.is_initialized()


def test_a_head_of_its_own_is_left_alone(rank: Rank, update: stock.StockUpdate) -> None:
    head = torch.full((6, 4), 3.0)
    send(update, {HEAD: head, EMBEDDING: torch.ones(6, 4)})
    assert torch.equal(rank.held[HEAD], head)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_folder(rank: Rank, update: stock.StockUpdate, tmp_path: Path, tied: bool) -> None:
    """The same after SGLang has read the weights itself."""
    weights = {EMBEDDING: torch.ones(6, 4, dtype=torch.bfloat16)}
    save_file(weights if tied else weights | {HEAD: torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    update.begin()
    update.read(tmp_path)
    update.commit(1)
    assert rank.read.keys() == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    assert (HEAD in rank.held) == tied
    if tied:
        assert torch.equal(rank.held[HEAD], torch.ones(6, 4))


def test_buckets_out_of_order_or_missing(update: stock.StockUpdate) -> None:
    update.begin()
    with pytest.raises(WeightSyncError, match="got bucket 1, expected 0"):
        update.load(pack(1, 1, [("a", torch.ones(2))]))
    with pytest.raises(WeightSyncError, match="2 buckets were to be sent, 0 were"):
        update.commit(2)
