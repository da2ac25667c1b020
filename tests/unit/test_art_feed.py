"""A run that is fed: what it takes, what it refuses, and who may be at the other end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_sglang.art.feeding import Feeding
from megatron_sglang.errors import DataError, EngineDiedError
from megatron_sglang.feed.batch import Wanted, parse
from megatron_sglang.feed.door import NAME, Door
from megatron_sglang.feed.sampler import Feed
from megatron_sglang.types import RolloutGroup
from megatron_sglang.unix_socket import short_name

WANTED = Wanted.of(batch=0, version=1, groups=2, members=2, longest=8, vocab_size=100)


def row(ids: list[int], sampled: int, **other: Any) -> dict[str, Any]:
    """A row whose last `sampled` tokens are the model's."""
    seen = len(ids) - sampled
    made = {
        "ids": ids,
        "mask": [0] * seen + [1] * sampled,
        "logprobs": [0.0] * seen + [-0.25] * sampled,
        "version": 1,
        "reward": 0.5,
        "passed": False,
        "text": "x",
        "turns": 1,
        "finish_reason": "stop",
    }
    return made | other


def groups(**other: Any) -> list[list[dict[str, Any]]]:
    """Two groups of two; `other` goes into the last row."""
    return [[row([1, 2, 3], 1), row([1, 2, 4, 5], 2)], [row([6, 7], 1), row([6, 8], 1) | other]]


def message(**other: Any) -> bytes:
    return json.dumps({"batch": 0, "learning_rate": None, "groups": groups()} | other).encode()


# ---- messages ----


def test_rows_become_groups() -> None:
    first, second = parse(message(learning_rate=0.5), WANTED).groups
    assert (first.prompt.token_ids_T, second.prompt.token_ids_T) == ((1, 2), (6,))
    assert [done.token_ids_T for done in first.completions_G] == [(3,), (4, 5)]
    assert first.completions_G[1].logprobs_T == (-0.25, -0.25)
    assert first.completions_G[0].loss_mask_T == ()
    assert [score.value for score in second.scores_G] == [0.5, 0.5]
    assert parse(message(learning_rate=0.5), WANTED).learning_rate == 0.5


def test_half_a_surrogate_pair_in_a_text_is_escaped() -> None:
    [_, group] = parse(message(groups=groups(text="a\udc80ü")), WANTED).groups
    assert group.completions_G[1].text == "a\\udc80ü"


def test_prompts_of_a_group_may_differ_and_turns_may_follow() -> None:
    """What all rows begin with is the prompt; the rest of a longer prompt is observed."""
    unlike = row([1, 2, 9, 3, 4, 5], 1, mask=[0, 0, 0, 1, 0, 1], logprobs=[-9, -9, -9, -0.5, -9, -0.25])
    [group, _] = parse(message(groups=[[row([1, 2, 3], 1), unlike], groups()[1]]), WANTED).groups
    assert group.prompt.token_ids_T == (1, 2)
    done = group.completions_G[1]
    assert (done.token_ids_T, done.loss_mask_T) == ((9, 3, 4, 5), (0, 1, 0, 1))
    assert done.logprobs_T == (0.0, -0.5, 0.0, -0.25)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object"),
        (message(more=1), "expected an object"),
        (message(batch=1), "waits for batch 0"),
        (message(learning_rate=-1), "learning_rate=-1; expected .*, or null for the one that holds already"),
        (message().replace(b'"learning_rate": null', b'"learning_rate": NaN'), "not JSON"),
        (message(groups=groups()[:1]), "1 groups of 2 rows; this run takes 2 groups of 2 rows"),
        (message(groups=[one[:1] for one in groups()]), "2 groups of 1 rows; this run takes 2 groups of 2 rows"),
        (message(groups=[]), "0 groups of no rows"),
        (message(groups={}), "list of lists"),
        (message(groups=groups(ids=[6, "8"])), "group 1, row 1: an id"),
        (message(groups=groups(ids=[6, True])), "an id"),
        (message(groups=groups(ids=[6, 100])), "from 0 to 99"),
        (message(groups=groups(ids=[6])), "1 ids, 2 mask"),
        (message(groups=[groups()[0], [row([6] * 9, 1)] * 2]), "at most 8 fit"),
        (message(groups=groups(mask=[0, 2])), "mask"),
        (message(groups=groups(mask=[0, 0])), "nothing was sampled"),
        (message(groups=groups(mask=[1, 1])), "a prompt comes before"),
        (message(groups=groups(ids=[9, 8])), "same token"),
        (message(groups=groups(logprobs=[0, 0.1])), "logprob"),
        (message(groups=groups(logprobs=[0, None])), "logprob"),
        (message(groups=groups(version=2)), "sampled with weight version 2; the run is at version 1"),
        (message(groups=groups(reward=None)), "reward"),
        (message(groups=groups(reward=10**400)), "reward"),
        (message(groups=groups(passed=1)), "passed"),
        (message(groups=groups(finish_reason="abort")), "finish_reason"),
        (message(groups=groups(more=1)), "exactly"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_messages_are_refused(wrong: bytes, what: str) -> None:
    """Each of these would train on something else than what was sampled, or break the run."""
    with pytest.raises(DataError, match=what):
        parse(wrong, WANTED)


def test_a_multiple_of_the_groups_is_several_train_steps() -> None:
    assert len(parse(message(groups=groups() * 3), WANTED).groups) == 6


# ---- the socket ----


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    door = Door(tmp_path / "run")
    yield Feed(door, str, lambda: None, lambda: 1, 2, 2, 8, 100, timeout_s=10.0)
    door.close()


@pytest.fixture
def later() -> Iterator[Callable[..., Future[Any]]]:
    """Run something beside the test."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit


def connect(feed: Feed) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(10.0)
    with short_name(feed.door.path) as name:
        peer.connect(name)
    return peer


def test_the_backends_end_and_the_runs_end_fit(feed: Feed, later: Callable[..., Future[Any]]) -> None:
    """A refused batch changes nothing, a good one is taken, and its learning rate holds from then on."""
    first = later(feed.batch, feed, 0)

    async def give() -> None:
        feeding = await Feeding.open(feed.door.path)
        wanted = await feeding.wanted()
        assert (wanted.batch, wanted.version, wanted.groups, wanted.members) == (0, 1, 2, 2)
        with pytest.raises(DataError, match="version 7"):
            await feeding.give(groups(version=7), None)
        await feeding.give(groups(), 0.5)
        again = later(feed.batch, feed, 1)
        assert (await feeding.wanted()).batch == 1
        with pytest.raises(DataError, match="split it"):
            await feeding.give(groups(text="x" * wanted.limit_bytes), None)
        await feeding.give(groups(), None)
        assert len(again.result(10)) == 2
        await feeding.close()

    asyncio.run(give())
    assert all(isinstance(group, RolloutGroup) for group in first.result(10))
    assert feed.learning_rate == 0.5
    with pytest.raises(DataError, match="is gone"):
        feed.batch(feed, 2)


def test_a_learning_rate_outlives_a_resume(tmp_path: Path, feed: Feed, later: Callable[..., Future[Any]]) -> None:
    """Else a resumed run would train at Megatron's rate where an uninterrupted one keeps the peer's."""
    begun = json.loads(json.dumps(feed.state()))
    done = later(feed.batch, feed, 0)
    with connect(feed) as peer:
        assert b"ready" in peer.recv(4096)
        peer.sendall(message(learning_rate=0.5) + b"\n")
        done.result(10)
    state = json.loads(json.dumps(feed.state()))
    door = Door(tmp_path / "resumed")
    resumed = Feed(door, str, lambda: None, lambda: 1, 2, 2, 8, 100, timeout_s=10.0)
    resumed.restore(state)
    assert resumed.learning_rate == 0.5
    done = later(resumed.batch, resumed, 0)
    with connect(resumed) as peer:
        assert b"ready" in peer.recv(4096)
        peer.sendall(message() + b"\n")
        done.result(10)
    assert resumed.learning_rate == 0.5
    resumed.restore(begun)  # as the cycle does where a batch failed after it was taken
    assert resumed.learning_rate is None
    door.close()


def test_a_checkpoint_without_a_learning_rate_leaves_it_to_megatron(feed: Feed) -> None:
    feed.restore({"feed": True})
    assert feed.learning_rate is None
    with pytest.raises(DataError, match="prompts of its own"):
        feed.restore({"epoch": 0, "position": 4})


def test_only_one_peer_and_only_of_this_user(feed: Feed, later: Callable[..., Future[Any]]) -> None:
    """The socket is 0600; while one peer is there a second cannot connect, and there is no second chance."""
    assert feed.door.path.stat().st_mode & 0o777 == 0o600
    done = later(feed.batch, feed, 0)
    with connect(feed) as peer:
        assert b"ready" in peer.recv(4096)
        with pytest.raises(FileNotFoundError):
            connect(feed)
    with pytest.raises(DataError, match="is gone"):
        done.result(10)


def test_a_message_without_end_does_not_fill_the_memory(feed: Feed, later: Callable[..., Future[Any]]) -> None:
    done = later(feed.batch, feed, 0)
    with connect(feed) as peer:
        limit = json.loads(peer.recv(4096))["ready"]["limit_bytes"]
        sender = threading.Thread(target=lambda: _send_until_refused(peer, limit))
        sender.start()
        with pytest.raises(DataError, match=f"longer than {limit} bytes"):
            done.result(10)
        feed.door.close()
        sender.join(10)
        assert not sender.is_alive()


def _send_until_refused(peer: socket.socket, limit: int) -> None:
    try:
        for _ in range(100 * limit // 65536):
            peer.sendall(b"[" * 65536)
    except OSError:
        return


@pytest.mark.parametrize("connected", [False, True])
def test_a_silent_peer_does_not_hold_the_run_for_ever(tmp_path: Path, connected: bool) -> None:
    door = Door(tmp_path)
    feed = Feed(door, str, lambda: None, lambda: 1, 2, 2, 8, 100, timeout_s=0.2)
    peer = connect(feed) if connected else None
    start = time.monotonic()
    with pytest.raises(DataError, match="in time"):
        feed.batch(feed, 0)
    assert time.monotonic() - start < 5
    if peer is not None:
        peer.close()
    door.close()
    assert not door.path.exists()


def test_a_dead_engine_is_noticed_while_waiting(tmp_path: Path) -> None:
    """The cycle then starts it anew, and the same batch is wanted again."""
    door = Door(tmp_path)
    feed = Feed(door, str, lambda: "exit code 9", lambda: 1, 2, 2, 8, 100)
    with pytest.raises(EngineDiedError, match="exit code 9"):
        feed.batch(feed, 0)
    door.close()


def test_folders_of_any_depth_can_hold_a_socket(tmp_path: Path) -> None:
    """The kernel takes names of 107 bytes; run folders are longer."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    door = Door(deep)
    assert (deep / NAME).is_socket()
    with short_name(deep / NAME) as name, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
    door.close()
