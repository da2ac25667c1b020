"""The loader inside an engine rank: what it accepts, what it refuses, and that nothing escapes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.engine import loader, wire
from megatron_sglang.engine.options import MAILBOX_VARIABLE
from megatron_sglang.errors import WeightSyncError

Named = list[tuple[str, torch.Tensor]]


class Model(torch.nn.Module):
    """An embedding, a head tied by configuration only, and a fused layer of two checkpoint tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(6, 4)
        self.lm_head = torch.nn.Linear(4, 6, bias=False)
        self.gate_up = torch.nn.Linear(4, 6, bias=False)

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            if name == "model.embed_tokens.weight":
                self.model.embed_tokens.weight.copy_(tensor)
            elif name in ("gate", "up"):
                self.gate_up.weight[slice(0, 3) if name == "gate" else slice(3, 6)].copy_(tensor)


class Rank:
    """Sends messages to the loader as the engine would, and reads the answers."""

    def __init__(self, mailbox: Path) -> None:
        self.mailbox = mailbox
        self.model = Model()
        self.sent = 0

    def __call__(self, command: str, data: torch.Tensor | None = None, **fields: Any) -> dict[str, Any]:
        self.sent += 1
        envelope = json.dumps({"id": self.sent, "rank": 0, "command": command, **fields})
        loader.load(self.model, [(envelope, torch.empty(0, dtype=torch.uint8) if data is None else data)])
        return wire.collect(self.mailbox, self.sent, 1, command)[0]

    def load(self, bucket: Bucket) -> None:
        self("load", bucket.data, bucket=bucket.header())

    def publish(self, version: int, *groups: Named) -> dict[str, str]:
        self("begin", version=version)
        for index, group in enumerate(groups):
            self.load(pack(version, index, group))
        return self("commit", version=version, buckets=len(groups))["digests"]


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setenv(MAILBOX_VARIABLE, str(tmp_path))
    monkeypatch.setattr(loader, "_open", {})
    monkeypatch.setattr(loader, "_committed", {})
    return Rank(tmp_path)


@pytest.fixture
def weights() -> Named:
    return [("model.embed_tokens.weight", torch.randn(6, 4)), ("gate", torch.randn(3, 4)), ("up", torch.randn(3, 4))]


def test_digests_follow_weights_not_buckets(rank: Rank, weights: Named) -> None:
    """A digest that depended on the cut could not be compared between bucket sizes or trainer layouts."""
    assert rank.publish(1, weights) == rank.publish(2, weights[:1], weights[1:])
    changed = [*weights[:2], ("up", weights[2][1] + 1)]
    before, after = rank.publish(3, weights), rank.publish(4, changed)
    assert [name for name in before if before[name] != after[name]] == ["gate_up.weight"]


def test_tied_head_is_filled_from_the_embedding(rank: Rank, weights: Named) -> None:
    """SGLang's MoE models ignore tie_word_embeddings and would generate with a random head."""
    rank.publish(1, weights)
    assert torch.equal(rank.model.lm_head.weight, weights[0][1])
    assert rank("adopt")["digests"].keys() == dict(rank.model.named_parameters()).keys()


def test_half_of_a_fused_parameter_is_noticed(rank: Rank, weights: Named) -> None:
    """The other half would keep the values of an older version."""
    with pytest.raises(WeightSyncError, match=r"unfilled.*gate_up"):
        rank.publish(1, weights[:2])


def test_nan_weights_are_refused(rank: Rank, weights: Named) -> None:
    """A diverged trainer must not publish."""
    weights[1][1][0, 0] = torch.nan
    with pytest.raises(WeightSyncError, match="NaN or infinity: gate_up"):
        rank.publish(1, weights)


def test_later_versions_bring_the_same_tensors(rank: Rank, weights: Named) -> None:
    """A broadcast could hide a shape that changed between versions."""
    rank.publish(1, weights)
    with pytest.raises(WeightSyncError, match=r"1 tensors are missing, new or of another shape.*surplus"):
        rank.publish(2, [*weights, ("surplus", torch.zeros(1))])


def test_order_duplicates_and_dtypes(rank: Rank, weights: Named) -> None:
    """Each of these would load without an error in SGLang."""
    rank("begin", version=1)
    with pytest.raises(WeightSyncError, match="expected bucket 0 of version 1"):
        rank.load(pack(1, 1, weights))
    with pytest.raises(WeightSyncError, match="already failed"):
        rank.load(pack(1, 0, weights))
    rank("begin", version=2)
    rank.load(pack(2, 0, weights))
    with pytest.raises(WeightSyncError, match="gate arrived twice"):
        rank.load(pack(2, 1, weights[1:]))
    with pytest.raises(WeightSyncError, match=r"gate is torch\.float16"):
        rank.publish(3, [("gate", torch.zeros(3, 4, dtype=torch.float16))])


def test_commit_counts_buckets(rank: Rank, weights: Named) -> None:
    """The trainer's last buckets may have been lost."""
    rank("begin", version=1)
    rank.load(pack(1, 0, weights))
    with pytest.raises(WeightSyncError, match="commit of version 1 with 2 buckets, but this rank has 1"):
        rank("commit", version=1, buckets=2)


def test_a_stream_ends_what_another_path_has_begun(rank: Rank, weights: Named) -> None:
    """It writes to the same parameters: the version before could be committed with parts of this one."""
    rank("begin", version=1)
    rank.load(pack(1, 0, weights))
    with pytest.raises(WeightSyncError, match="a stream was opened before any plan"):
        rank("stream", version=2)
    with pytest.raises(WeightSyncError, match="commit arrived before any begin"):
        rank("commit", version=1, buckets=1)
    assert rank.publish(3, weights)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(byte=st.integers(0, 191), bit=st.integers(0, 7))
def test_any_flipped_bit_is_named(rank: Rank, byte: int, bit: int) -> None:
    """Corruption must be found whichever bit it hits (16 tensor-aligned floats: no padding between)."""
    weights = [(name, torch.arange(16.0).view(4, 4)) for name in ("a", "b", "c")]
    rank("begin", version=1)
    bucket = pack(1, 0, weights)
    data = bucket.data.clone()
    data[byte] ^= 1 << bit
    with pytest.raises(WeightSyncError, match=f"tensor {'abc'[byte // 64]} has digest .*bytes changed"):
        rank.load(dataclasses.replace(bucket, data=data))


def test_no_exception_leaves_the_loader(rank: Rank, weights: Named) -> None:
    """An exception would end every process of a real engine."""
    rank("begin", version=1)
    rank.model.load_weights = lambda _: 1 / 0
    with pytest.raises(WeightSyncError, match="ZeroDivisionError"):
        rank.load(pack(1, 0, weights))
    rank("begin", version=2)
    with pytest.raises(WeightSyncError, match="unknown command"):
        rank("dance")
    loader.load(rank.model, [("not json", torch.empty(0))])
    with pytest.raises(WeightSyncError, match="no answer"):
        wire.collect(rank.mailbox, 999, 1, "silence")
