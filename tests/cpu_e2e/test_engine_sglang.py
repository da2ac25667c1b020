"""What the engine room promises, held against a real SGLang server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
import torch
from engine_tools import Publisher, Weights, make_buckets, until_decoding

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.errors import EngineStaleError, WeightSyncError
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]

Rescore = Callable[[Weights, Sequence[GenerateRequest], Sequence[Completion]], list[torch.Tensor]]


def requests(count: int, tokens: int = 24, temperature: float = 1.0) -> list[GenerateRequest]:
    """Prompts of different lengths, one seed each."""
    return [
        GenerateRequest(
            tuple((index * 7 + position * 3) % 500 + 5 for position in range(10 + index % 30)),
            SamplingParams(temperature=temperature, max_new_tokens=tokens, seed=index),
        )
        for index in range(count)
    ]


def assert_scored(scores: Sequence[torch.Tensor], completions: Sequence[Completion], temperature: float = 1.0) -> None:
    worst = max(
        (score - torch.tensor(completion.logprobs_T)).abs().max().item()
        for score, completion in zip(scores, completions, strict=True)
    )
    assert worst * temperature <= 1e-5, "of logits, which a temperature below 1 spreads"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_transformers(
    engine: HttpEngine, publish: Publisher, weights: Weights, rescore: Rescore, temperature: float
) -> None:
    """A wrong shard, a wrong temperature or logprobs of other tokens would all be off by far more than 1e-5."""
    publish(weights)
    asked = requests(12, temperature=temperature)
    completions = engine.generate(asked)
    assert_scored(rescore(weights, asked, completions), completions, temperature or 1.0)
    assert {completion.weight_version for completion in completions} == {engine.version}


def test_update_replaces_every_weight(
    engine: HttpEngine, publish: Publisher, weights: Weights, other_weights: Weights, rescore: Rescore
) -> None:
    """An engine that kept any old tensor, or a cached prefix of the old weights, would not score like the new ones."""
    asked = requests(8)
    before = publish(weights)
    engine.generate(asked)
    after = publish(other_weights)
    completions = engine.generate(asked)
    assert_scored(rescore(other_weights, asked, completions), completions)
    assert before != after
    assert publish(weights) == before


def test_digest_does_not_depend_on_bucket_size(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Tensors lost or mangled at bucket borders would change the digest."""
    sizes = (16 << 10, 1 << 20, 1 << 30)
    assert len({len(make_buckets(1, weights, size)) for size in sizes}) == len(sizes)
    assert len({publish(weights, size) for size in sizes}) == 1


def _flip(bucket: Bucket) -> Bucket:
    data = bucket.data.clone()
    data[bucket.specs[0].offset + 5] ^= 1
    return dataclasses.replace(bucket, data=data)


def _as_bfloat16(bucket: Bucket) -> Bucket:
    return pack(bucket.version, bucket.index, [(name, tensor.bfloat16()) for name, tensor in bucket.tensors()])


def _one_row(bucket: Bucket) -> Bucket:
    return pack(bucket.version, bucket.index, [(name, tensor[:1]) for name, tensor in bucket.tensors()])


FAULTS: dict[str, tuple[Callable[[list[Bucket]], list[Bucket]], str]] = {
    "flipped bit": (lambda b: [b[0], _flip(b[1]), *b[2:]], "bytes changed"),
    "dropped": (lambda b: [b[0], *b[2:]], "dropped, repeated or reordered"),
    "repeated": (lambda b: [b[0], b[0], *b[1:]], "dropped, repeated or reordered"),
    "reordered": (lambda b: [b[1], b[0], *b[2:]], "dropped, repeated or reordered"),
    "last missing": (lambda b: b[:-1], "commit"),
    "wrong dtype": (lambda b: [b[0], _as_bfloat16(b[1]), *b[2:]], "bfloat16"),
    "wrong shape": (lambda b: [b[0], _one_row(b[1]), *b[2:]], "engine rank 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_transfer_is_caught_and_healed(
    engine: HttpEngine, publish: Publisher, weights: Weights, fault: str
) -> None:
    """A damaged update must be refused by name, never served, and must not cost the engine its life."""
    good = publish(weights)
    version = publish.next_version
    damage, names = FAULTS[fault]
    buckets = make_buckets(version, weights, 200 << 10)

    def update() -> None:
        engine.begin_update(version)
        for bucket in damage(buckets):
            engine.load(bucket)
        engine.commit_update(version, len(buckets))

    with pytest.raises(WeightSyncError, match=f"weight version {version}, .*{names}"):
        update()
    with pytest.raises(EngineStaleError, match="last update failed"):
        engine.generate(requests(1))
    assert publish(weights) == good
    assert len(engine.generate(requests(2))) == 2


def test_missing_tensor_is_named(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """A tensor that never arrives leaves NaN behind, so even a first update, with nothing to compare to, finds it."""
    name = next(name for name in weights if "k_norm" in name)
    version = publish.next_version
    part = {key: tensor for key, tensor in weights.items() if key != name}
    engine.begin_update(version)
    engine.load(pack(version, 0, list(part.items())))
    with pytest.raises(WeightSyncError, match=r"k_norm\.weight"):
        engine.commit_update(version, 1)
    publish(weights)


def test_what_warmed_it_up_is_forgotten(
    engine: HttpEngine, publish: Publisher, weights: Weights, other_weights: Weights
) -> None:
    """An engine that must not serve answers all the same, and keeps no prefix of these weights for the next ones. That
    it does so before its first weights is the session's: see the fixture `engine`."""
    publish(weights)
    expected = [(one.token_ids_T, one.logprobs_T) for one in engine.generate(requests(8))]
    publish(other_weights)
    engine.stale = "as before the first weights"
    engine.warm_up(requests(8))
    with pytest.raises(EngineStaleError, match="as before the first weights"):
        engine.generate(requests(8))
    publish(weights)
    assert [(one.token_ids_T, one.logprobs_T) for one in engine.generate(requests(8))] == expected


def test_update_in_the_middle_of_requests(
    engine: HttpEngine, publish: Publisher, weights: Weights, other_weights: Weights, rescore: Rescore
) -> None:
    """SGLang kills itself when an update finds it busy; requests must end as aborted and the engine go on."""
    publish(weights)
    old = engine.version
    answers: list[list[Completion]] = []
    long = [dataclasses.replace(r, sampling=SamplingParams(max_new_tokens=200, seed=1)) for r in requests(160)]
    thread = threading.Thread(target=lambda: answers.append(engine.generate(long)))
    thread.start()
    asyncio.run(until_decoding(engine, 20))
    publish(other_weights)
    thread.join(60)
    assert any(completion.finish_reason == "abort" for completion in answers[0])
    assert {completion.weight_version for completion in answers[0]} == {old}
    completions = engine.generate(requests(4))
    assert_scored(rescore(other_weights, requests(4), completions), completions)


def test_release_and_resume(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Releasing twice or resuming what is not released is an error in SGLang; our client keeps count."""
    publish(weights)
    before = engine.generate(requests(8))
    engine.release()
    engine.release()
    with pytest.raises(EngineStaleError, match="released"):
        engine.generate(requests(1))
    publish(weights)
    after = engine.generate(requests(8))
    assert [c.token_ids_T for c in before] == [c.token_ids_T for c in after]


def test_same_seeds_same_tokens(engine: HttpEngine, publish: Publisher, weights: Weights) -> None:
    """Whatever ran before and whatever else is in the batch: tokens depend on prompt, seed and weights only."""
    publish(weights)
    asked = requests(32)
    first = engine.generate(asked)
    again = engine.generate(asked)
    assert first == again
    alone = [engine.generate([request])[0] for request in asked[:6]]
    assert [c.token_ids_T for c in alone] == [c.token_ids_T for c in first[:6]]
    reseeded = [dataclasses.replace(r, sampling=SamplingParams(max_new_tokens=24, seed=99)) for r in asked]
    assert [c.token_ids_T for c in engine.generate(reseeded)] != [c.token_ids_T for c in first]


def test_keys_are_required_and_nowhere_to_be_seen(engine: HttpEngine) -> None:
    """Whoever can load weights can run code: other users of the machine must get neither in nor at the keys."""
    user, admin = engine.server.api_key, engine.server.admin_key
    routes = {"/generate": admin, "/update_weights_from_tensor": user, "/flush_cache": user, "/pause_generation": user}
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.server.port}", trust_env=False) as client:
        for route, wrong in routes.items():
            assert client.post(route, json={}).status_code == 401, route
            answer = client.post(route, json={}, headers={"Authorization": f"Bearer {wrong}"})
            assert answer.status_code == 401, route
    info = engine.info()
    assert engine.server.log_path is not None
    visible = [str(info), engine.server.log_path.read_text()]
    supervisor = psutil.Process(engine.server.pid)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        visible += [" ".join(process.cmdline()), str(process.environ())]
    assert not any(key in text for key in (user, admin) for text in visible)


def test_idle_connections_are_kept(engine: HttpEngine) -> None:
    """SGLang closes them after five seconds. A client that is busy for so long, with ten thousand answers at once,
    sends its next request into a closed one, which fails because nothing is sent twice."""
    connection = http.client.HTTPConnection("127.0.0.1", engine.server.port, timeout=20)
    with contextlib.closing(connection):
        for pause_s in (5.5, 0.0):
            connection.request("GET", "/health")
            assert connection.getresponse().read() is not None
            time.sleep(pause_s)


def test_listens_on_loopback_only(engine: HttpEngine) -> None:
    """Every port of an SGLang engine amounts to a shell."""
    supervisor = psutil.Process(engine.server.pid)
    listening = [
        connection.laddr.ip
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}


def test_environment_of_torchrun_is_not_inherited(engine: HttpEngine) -> None:
    """With torchrun's variables SGLang's ranks try to join the trainer's process group and hang."""
    supervisor = psutil.Process(engine.server.pid)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & process.environ().keys()
    assert os.environ.get("MEGATRON_SGLANG_MAILBOX") is None
