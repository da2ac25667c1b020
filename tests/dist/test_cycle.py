"""The pipeline on two gloo ranks with the shipped fake engine: versions, faults, and one failure on all ranks.

The ranks are forked, so each case is a function that returns JSON; what a rank raises comes back as text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.comm import TorchComm
from megatron_sglang.config import AlgoConfig
from megatron_sglang.cycle import Cycle, Leader
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.errors import MegatronSglangError, WeightSyncError
from megatron_sglang.prompts.source import PromptSource
from megatron_sglang.rollout import Rollout
from megatron_sglang.sync import GenericPath
from megatron_sglang.sync_plan import plan_for
from megatron_sglang.trace import RunLog
from megatron_sglang.types import Completion, MergeFidelity, Prompt, SamplingParams, Score

MODEL = "examples/tiny_fim/model"


class EvenTokens:
    """A reward without a sandbox: the share of even token ids."""

    tier = "none"

    def score(self, pairs: list[tuple[Prompt, Completion]]) -> list[Score]:
        shares = [sum(t % 2 == 0 for t in done.token_ids_T) / len(done.token_ids_T) for _, done in pairs]
        return [Score(share, share == 1.0) for share in shares]

    def close(self) -> None: ...


class TwoTensors:
    """Weights of a trainer: two tensors in two buckets, other values in each version; may fail on one rank."""

    def __init__(self, fails_on: int | None = None) -> None:
        self.fails_on = fails_on

    def buckets(self, version: int) -> Iterator[Bucket]:
        yield pack(version, 0, [("a.weight", torch.full((4, 4), float(version)))])
        if self.fails_on == dist.get_rank():
            raise WeightSyncError(f"version {version}: tensor b.weight went missing")
        yield pack(version, 1, [("b.weight", torch.arange(8.0) + version)])

    def fidelity(self) -> MergeFidelity:
        return MergeFidelity(1.0, 0.0, 0.5, {})


def make(folder: Path, fails_on: int | None = None, faults: list[dict[str, Any]] | None = None) -> Cycle:
    comm = TorchComm(timeout_s=60)
    leader = None
    if comm.rank == 0:
        engine = create_engine(EngineOptions(model_path=MODEL, kind="fake", tp_size=2, extra={"faults": faults or []}))
        engine.start()
        engine.wait_ready()
        sampling = SamplingParams(max_new_tokens=6, stop_token_ids=(0,))
        rollout = Rollout(engine, EvenTokens(), lambda ids: " ".join(map(str, ids)), sampling, 4, seed=1)
        prompts = [Prompt(f"p{n}", (n + 1, 2, 3), "test") for n in range(6)]
        leader = Leader(engine, rollout, PromptSource(prompts, 2), prompts[:3], RunLog(folder, echo=str))
    path = GenericPath(comm, TwoTensors(fails_on), leader.engine if leader is not None else None)
    return Cycle(comm, path, leader, AlgoConfig(), seed=1)


def close(cycle: Cycle) -> None:
    if cycle.leader is not None:
        cycle.leader.engine.close()
        cycle.leader.log.close()


def two_ranks(case: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Run `case` on two forked gloo ranks; what each returned, or the traceback it died of."""
    context = multiprocessing.get_context("fork")
    pipes, ranks = [], []
    for rank in range(2):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(case, rank, folder, send))
        process.start()
        send.close()
        pipes.append(receive)
        ranks.append(process)
    replies = [json.loads(pipe.recv()) if pipe.poll(240) else {"error": "no answer"} for pipe in pipes]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert not [reply for reply in replies if "error" in reply], replies
    return [reply["value"] for reply in replies]


def _rank(case: Callable[[Path], Any], rank: int, folder: Path, send: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        reply = {"value": case(folder)}
    except BaseException:  # noqa: BLE001 - the process boundary
        reply = {"error": traceback.format_exc()}
    send.send(json.dumps(reply))
    dist.destroy_process_group()


def _publish_and_collect(folder: Path) -> Any:
    cycle = make(folder)
    try:
        first = cycle.publish()
        samples = cycle.collect(0)
        second = cycle.publish()
        later = cycle.collect(1)
        passed = cycle.evaluate()
        state = cycle.state()
        cycle.close_step(0)
    finally:
        close(cycle)
    return {
        "versions": [first.version, second.version, samples[0].weight_version, later[0].weight_version],
        "digests": [first.engine_digest, second.engine_digest],
        "sizes": [first.tensors, first.buckets, first.bytes],
        "samples": [(sample.prompt_ids_T, sample.response_ids_T, sample.advantage) for sample in samples],
        "groups": [sum(s.advantage for s in samples[i : i + 4]) for i in (0, 4)],
        "passed": passed,
        "state": state,
    }


def test_every_rank_sees_the_same_batch_of_the_published_version(tmp_path: Path) -> None:
    """Ranks that train on different batches, or on completions of older weights than published, diverge silently."""
    first, second = two_ranks(_publish_and_collect, tmp_path)
    assert first == second
    assert first["versions"] == [1, 2, 1, 2]
    assert first["digests"][0] != first["digests"][1]
    assert first["sizes"] == [2, 2, 96]
    assert len(first["samples"]) == 8
    assert first["groups"] == pytest.approx([0, 0], abs=1e-6)
    assert first["state"]["version"] == 2
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["sync/version"] == 2
    assert 0 <= record["rollout/reward"] <= 1


def _failing_export(folder: Path) -> Any:
    cycle = make(folder, fails_on=1)
    try:
        cycle.publish()
    except WeightSyncError as error:
        stale = ""
        if cycle.leader is not None:
            with pytest.raises(MegatronSglangError) as caught:
                cycle.leader.rollout.collect(cycle.leader.held_out, 0)
            stale = type(caught.value).__name__
        return [str(error), stale, cycle.version]
    finally:
        close(cycle)
    return "published"


def test_a_failure_on_one_rank_is_raised_on_all_and_nothing_is_served(tmp_path: Path) -> None:
    """One rank's error must not leave the others in a collective, nor the engine serving half of a version."""
    (first, stale, version), (second, _, _) = two_ranks(_failing_export, tmp_path)
    assert "version 1 was not published" in first
    assert "rank 1: version 1: tensor b.weight went missing" in first
    assert "tensor b.weight went missing" in second
    assert stale == "EngineStaleError"
    assert version == 0


def _flipped_bit(folder: Path) -> Any:
    faults = [{"path": "/update_weights_from_tensor", "do": "flip_bit", "after": 1}]
    cycle = make(folder, faults=faults)
    try:
        try:
            cycle.publish()
            first = "published"
        except WeightSyncError as error:
            first = str(error)
        healed = cycle.publish()
        return [first, healed.version, cycle.collect(0)[0].weight_version]
    finally:
        close(cycle)


def test_a_flipped_bit_is_caught_and_the_next_sync_heals(tmp_path: Path) -> None:
    """A version is committed only if every engine rank holds what the trainer sent."""
    first, second = two_ranks(_flipped_bit, tmp_path)
    for reason, version, sampled in (first, second):
        assert "not published" in reason
        assert "engine rank" in reason
        assert version == sampled == 1


class Shifted(TwoTensors):
    """Other values than those to be published."""

    def buckets(self, version: int) -> Iterator[Bucket]:
        for bucket in super().buckets(version):
            yield pack(version, bucket.index, [(name, tensor + 1) for name, tensor in bucket.tensors()])


def _better_path_that_is_none(folder: Path) -> Any:
    found = []
    for kind in ("plain", "untraceable", "different"):
        cycle, said, served = make(folder), [], []

        def direct(cycle: Cycle = cycle, kind: str = kind) -> Any:
            if kind == "different":
                return GenericPath(cycle.comm, Shifted(), cycle._engine)
            shapes = {"a.weight": (4, 4), "b.weight": (8,)}
            return plan_for(cycle.comm, cycle._engine, 2, shapes, list, limit=100)

        try:
            if cycle.leader is not None:
                cycle.leader.log._echo = said.append
                engine: Any = cycle.leader.engine
                serve = engine.publish
                engine.publish = lambda version, serve=serve, served=served: (served.append(version), serve(version))
            cycle.make_direct = None if kind == "plain" else direct
            digests = [cycle.publish().engine_digest for _ in range(2)]
            sampled = {sample.weight_version for sample in cycle.collect(0)}
            found.append([digests, sorted(sampled), cycle.path.name, said, served])
        finally:
            close(cycle)
    return found


def test_where_the_direct_path_does_not_apply_the_generic_one_is_taken_and_said_once(tmp_path: Path) -> None:
    """An engine that cannot be traced, and one that the direct path would leave with other weights: the run goes on
    with the right ones, on all ranks, and its owner learns why it is slow."""
    (plain, untraceable, different), on_the_other = two_ranks(_better_path_that_is_none, tmp_path)
    assert plain[3] == []
    for result in (untraceable, different):
        assert result[:3] == plain[:3] == [plain[0], [2], "generic"]
        assert len(result[3]) == 1, result[3]
    assert "the generic path, because the direct one does not apply: layout, engine rank 0: " in untraceable[3][0]
    assert "has no layout" in untraceable[3][0]
    assert different[4] == [1, 1, 2], "twice by the generic path: what the direct one left was served to nobody"
    assert f"is not that of the generic path, {plain[0][0]}" in different[3][0]
    assert [result[:3] for result in on_the_other] == [plain[:3]] * 3


class Planned(GenericPath):
    """A direct path of a certain plan, for an engine without a layout; counts what it sends."""

    name = "planned"

    def __init__(self, cycle: Cycle, plan: Any, sent: list[str]) -> None:
        super().__init__(cycle.comm, TwoTensors(), cycle._engine)
        self.plan, self.sent = plan, sent

    def send(self, version: int) -> Any:
        self.sent.append(self.name)
        return super().send(version)


def _restarted(folder: Path) -> Any:
    cycle, sent = make(folder), []
    generic = Planned(cycle, None, sent)
    generic.name = "generic"
    plans = [["a plan"]] * 3 + [["another"]] * 2
    try:
        cycle.path, cycle.make_direct = cycle._at_start = generic, lambda: Planned(cycle, plans.pop(0), sent)
        found = [cycle.publish().engine_digest]
        for _ in range(3):
            cycle._revive(WeightSyncError("it died"))
            found.append(cycle._publish(cycle.version).engine_digest)
            sent.append("|")
        cycle.path, cycle.make_direct = cycle._at_start = None, lambda: Planned(cycle, plans.pop(0), sent)
        cycle._proved_plan = None
        found.append(cycle._publish(cycle.version).engine_digest)
        return [found, sent, cycle.path and cycle.path.name]
    finally:
        close(cycle)


def test_an_engine_that_was_started_again_is_compared_again_only_if_it_is_laid_out_otherwise(tmp_path: Path) -> None:
    """The generic path takes a minute of a large model; a plan that has left its bits need not wait for it again."""
    for found, sent, name in two_ranks(_restarted, tmp_path):
        assert len(set(found)) == 1
        text = " ".join(sent)
        assert text == "generic planned planned | planned | generic planned | planned", text
        assert name == "planned"


def _shuffled(folder: Path) -> Any:
    cycle = make(folder)
    try:
        cycle.publish()
        plain = [sample.advantage for sample in cycle.collect(0)]
        if cycle.leader is not None:
            cycle.leader.prompts.restore(PromptSource(cycle.leader.prompts._prompts, 2).state())
        cycle.algo = AlgoConfig(shuffle_rewards=True)
        return [plain, [sample.advantage for sample in cycle.collect(0)]]
    finally:
        close(cycle)


def test_shuffled_rewards_are_other_rewards(tmp_path: Path) -> None:
    """The control experiment proves nothing if it trains on the true rewards."""
    plain, shuffled = two_ranks(_shuffled, tmp_path)[0]
    assert plain != shuffled


def _errors(_folder: Path) -> Any:
    comm = TorchComm(timeout_s=60)
    found = []

    def fails() -> None:
        raise WeightSyncError("version 7, bucket 3: broken")

    for action in (
        lambda: comm.from_leader(fails),
        lambda: comm.agree(ValueError("odd") if comm.rank else None),
        lambda: comm.from_leader(lambda: {1}),
    ):
        try:
            action()
        except MegatronSglangError as error:
            found.append(f"{type(error).__name__}: {error}")
        except (ValueError, TypeError) as error:
            found.append(f"own {error}")
    found.append(comm.from_leader(lambda: {"pi": 3.141592653589793, "list": [1, None]}))
    return [*found, comm.gather("x" * (comm.rank * 1000))]


def test_values_and_errors_travel_between_ranks(tmp_path: Path) -> None:
    """The same class and text on every rank, and for a value that is no JSON; floats unchanged; parts of any length."""
    first, second = two_ranks(_errors, tmp_path)
    assert first[0] == second[0] == "WeightSyncError: version 7, bucket 3: broken"
    assert first[1] == "MegatronSglangError: rank 1: ValueError: odd"
    assert second[1] == "own odd"
    assert first[2] == "own Object of type set is not JSON serializable"
    assert second[2] == "MegatronSglangError: TypeError: Object of type set is not JSON serializable"
    assert first[3] == second[3] == {"pi": 3.141592653589793, "list": [1, None]}
    assert [len(part) for part in first[4]] == [0, 1000]
