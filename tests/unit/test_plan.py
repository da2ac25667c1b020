"""`megatron-sglang plan`: names and shapes from config.json, the trainer's half, bytes, memory, seconds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_sglang.errors import ConfigError, WeightSyncError
from megatron_sglang.placement import Placement
from megatron_sglang.plan import command, shapes
from megatron_sglang.plan.cost import H200, MEASURED, Load, Steps, figures, host_for, predict
from megatron_sglang.plan.trainer import Trainer
from megatron_sglang.plan.update import Update, loads_of, steps_of, update_of
from megatron_sglang.transfer import Box, Place, Region

TINY = Path(__file__).parents[2] / "examples/tiny_fim/model"
CHECKS = Path(__file__).parents[2] / "benchmarks/results"


def stored_shapes() -> dict[str, tuple[int, ...]]:
    """What `hub_shapes` finds by transformers (tests/cpu_e2e/test_plan_shapes.py), without importing it."""
    return {name: tuple(tensor.shape) for name, tensor in load_file(TINY / "model.safetensors").items()}


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"ep": 8}, {"pp": 2}, {"tp": 2, "ep": 4, "pp": 2, "cp": 1}])
def test_every_element_is_held_somewhere(sizes: dict[str, int]) -> None:
    """Equal to a real Megatron model: tests/dist/test_layouts.py. Here: ranks it has no processes for."""
    placement, found = Placement(world_size=8, **sizes), stored_shapes()
    shards = Trainer(found, shapes.heads(TINY), placement).shards()
    for name, shape in found.items():
        boxes = {shard.box for shard in shards if shard.name == name}
        rows, cols = shape if len(shape) == 2 else (shape[0], 1)
        assert sum(box.size for box in boxes) == rows * cols
        assert all(a == b or a.meet(b) is None for a in boxes for b in boxes)
    for shard in shards:
        assert (
            ".experts." not in shard.name
            or int(shard.name.split(".")[5]) * placement.ep // 8 == shard.rank % placement.ep
        )


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tp": 4}, "tensor-model-parallel-size=4 does not divide the 2 key-value heads"),
        ({"pp": 8}, "pipeline-model-parallel-size=8 does not divide the 4 layers"),
        ({"ep": 16}, "expert-model-parallel-size=16 does not divide the 8 experts"),
    ],
)
def test_sizes_that_megatron_refuses(sizes: dict[str, int], reason: str) -> None:
    """A plan for a run that cannot start."""
    with pytest.raises(ConfigError, match=reason):
        Trainer(stored_shapes(), shapes.heads(TINY), Placement(world_size=16, **sizes))


def test_an_unknown_tensor_is_an_error() -> None:
    """Left out, its bytes would be missing from every figure."""
    with pytest.raises(WeightSyncError, match=r"in_proj.* no tensor whose split"):
        Trainer({"model.layers.0.mixer.in_proj.weight": (8, 8)}, (4, 4), Placement(world_size=1))


UP = "model.layers.0.mlp.experts.{}.up_proj.weight"


def small_update(bucket_bytes: int) -> Update:
    """Two experts of 4 x 2 on two ranks, each cut in two for two engine ranks; a norm of 6 on all."""
    placement = Placement(world_size=2, ep=2)
    found = {UP.format(0): (4, 2), UP.format(1): (4, 2), "model.norm.weight": (6,)}
    found |= {"model.layers.0.mlp.gate.weight": (2, 2)}
    slots = [
        Region(rank, UP.format(expert), Box(2 * rank, 0, 2, 2), Place(f"w{expert}", 0, 2, 1))
        for rank in (0, 1)
        for expert in (0, 1)
    ]
    slots += [Region(rank, "model.norm.weight", Box(0, 0, 6, 1), Place("n", 0, 1, 1)) for rank in (0, 1)]
    return update_of(Trainer(found, (1, 1), placement).shards(), slots, 2, 2, bucket_bytes, buffers=2)


def test_bytes_buckets_and_memory_add_up() -> None:
    """By hand: each rank keeps half an expert and the norm, and sends half an expert."""
    update = small_update(16)
    assert update.pairs == {(0, 0): 20, (0, 1): 8, (1, 0): 8, (1, 1): 20}
    assert (update.total, update.stays, update.buckets) == (56, 40, 2)
    assert (update.largest, update.largest_of_rank) == (32, 16)
    assert update.loads == [Load(merged=28, sent=8, sent_far=0, received=28, digested=28 + 28)] * 2
    memory = update.memory[0]
    assert (memory.send, memory.receive, memory.total) == (2 * 16, 2 * 16, 64)


def test_more_engine_ranks_than_trainer_ranks_count_where_they_are_handed_over() -> None:
    """Split: rank 0 hands over to engine ranks 0 and 2, rank 1 to 1 and 3; nothing may fall out of the figures."""
    placement = Placement(world_size=2, ep=2)
    found = {UP.format(0): (4, 2), UP.format(1): (4, 2)}
    slots = [
        Region(rank, UP.format(expert), Box(rank, 0, 1, 2), Place(f"w{expert}", 0, 2, 1))
        for rank in range(4)
        for expert in (0, 1)
    ]
    update = update_of(Trainer(found, (1, 1), placement).shards(), slots, 2, 2, 1 << 20, buffers=2)
    assert update.pairs == {(source, target): 4 for source in (0, 1) for target in range(4)}
    assert (update.total, update.stays) == (32, 16)
    assert update.loads == [Load(merged=16, sent=8, sent_far=0, received=16, digested=16 + 16)] * 2
    assert update.memory[0].receive == 2 * (8 + 8)


def test_the_plan_depends_on_nothing_but_its_inputs() -> None:
    assert asdict(small_update(16)) == asdict(small_update(16))


def test_replicas_of_another_machine_are_left_alone() -> None:
    """Two machines of two, an expert-parallel group and an engine on each: each must feed its own engine alone."""
    found = {UP.format(expert): (4, 2) for expert in range(2)}
    shards = Trainer(found, (1, 1), Placement(world_size=4, ep=2)).shards()
    slots = [
        Region(rank, UP.format(expert), Box(rank % 2 * 2, 0, 2, 2), Place(f"w{expert}", 0, 2, 1))
        for rank in range(4)
        for expert in (0, 1)
    ]
    update = update_of(shards, slots, 4, 2, 1 << 20, replace(H200, gpus=2))
    assert (update.far, [load.sent for load in update.loads]) == (0, [8] * 4)
    assert sum(load.sent_far for load in update_of(shards, slots[:4], 4, 2, 1 << 20, replace(H200, gpus=1)).loads) == 16


def test_bytes_between_machines_count_on_the_network() -> None:
    near, far = loads_of({(0, 1): 5, (0, 2): 7, (0, 0): 9}, ranks=3, gpus=2)[0], 7
    assert (near.sent, near.sent_far, near.received) == (5, far, 9)


def test_seconds_are_those_of_the_busiest_rank() -> None:
    """By hand, on a host whose rates are powers of ten; ranks that do nothing change nothing."""
    ten, one = replace(H200.merge, value=10.0), replace(H200.merge, value=1.0)
    host = replace(
        H200, merge=ten, link=ten, to_itself=ten, network=one, copy=ten, digest=ten, hand_over=one, fixed=one
    )
    load, idle = Load(merged=50, sent=30, sent_far=3, received=50, digested=150), Load(0, 0, 0, 0, 0)
    expected = {"merge": 5.0, "link": 2.0, "to_itself": 1.7, "network": 3.0, "copy": 5.0, "digest": 15.0}
    expected |= {"hand_over": 4.0, "fixed": 1.0}
    for loads in ([load], [idle, load, idle]):
        found = predict(loads, Steps(buckets=4, merged=50, moved=20, far=3), host)
        assert asdict(found) == expected
        assert found.total == 35.0
    alone = Load(merged=50, sent=0, sent_far=0, received=50, digested=100)
    assert predict([alone], Steps(buckets=4, merged=50, moved=0, far=0), host).total == 30.0, "5 of it to itself"
    assert predict([alone], Steps(buckets=4, merged=50, moved=20, far=0), host).total == 30.0, "while others receive"
    uneven = Steps(buckets=4, merged=100, moved=40, far=3)
    assert predict([load, load], uneven, host).total == 42.0, "one rank at a time is busy"


def test_buckets_in_which_one_rank_sends_cost_its_time() -> None:
    """Two experts of two ranks for one engine rank each way: in one bucket both links are busy, in two each waits."""
    together, apart = ({(0, 1): 8, (1, 0): 8},), ({(0, 1): 8}, {(1, 0): 8})
    assert steps_of(together, ranks=2, gpus=8) == Steps(buckets=1, merged=8, moved=8, far=0)
    assert steps_of(apart, ranks=2, gpus=8) == Steps(buckets=2, merged=16, moved=16, far=0)
    assert steps_of(apart, ranks=2, gpus=1) == Steps(buckets=2, merged=16, moved=0, far=16)
    assert steps_of([{(0, 2): 3, (1, 2): 4}], ranks=3, gpus=8).moved == 7, "a link is busy with what arrives, too"


def test_a_network_adapter_is_busy_with_what_arrives_too() -> None:
    """An engine on one machine, experts on four: its GPU takes in what three others send, bucket after bucket."""
    pairs = {(rank, 0): 4 for rank in range(4)}
    assert steps_of([pairs, pairs], ranks=4, gpus=1) == Steps(buckets=2, merged=8, moved=0, far=2 * 3 * 4)
    near_and_far = {(0, 0): 9, (1, 0): 5, (2, 0): 3, (3, 0): 4}
    assert steps_of([near_and_far], ranks=4, gpus=2) == Steps(buckets=1, merged=9, moved=5, far=3 + 4)
    assert steps_of([{(0, 2): 3, (0, 4): 4}], ranks=6, gpus=2).far == 7, "one that sends to several sends the more"
    assert steps_of([{(2, 0): 3, (3, 4): 4}], ranks=4, gpus=2).far == 7, "both engine ranks are handed to by rank 0"
    found = {UP.format(expert): (4, 2) for expert in range(4)}
    shards = Trainer(found, (1, 1), Placement(world_size=4, ep=4)).shards()
    slots = [Region(0, name, Box(0, 0, 4, 2), Place(name, 0, 2, 1)) for name in found]
    update = update_of(shards, slots, 4, 2, 1 << 20, replace(H200, gpus=1))
    assert (update.steps.far, max(load.sent_far for load in update.loads)) == (3 * 16, 16)
    assert update.seconds.network == 3 * 16 / H200.network.value


def test_the_host_is_the_one_that_was_measured_with_as_many_gpus() -> None:
    """Links of two GPUs are slower than those of eight: one figure for both would be off by half."""
    assert [host_for(gpus).gpus for gpus in (1, 2, 3, 4, 5, 8, 72)] == [2, 2, 4, 4, 8, 8, 8]
    assert all(figure.value > 0 for host in MEASURED.values() for figure in figures(host).values())


def test_what_was_predicted_for_measured_updates() -> None:
    """benchmarks/plan_check.py plans them anew; what it has written must be what the figures give today. How far off
    each is, and what older code's updates say: docs/plan.md."""
    rows = json.loads((CHECKS / "plan_check.json").read_text())
    assert {row["gpus"] for row in rows} == {1, 2, 4}
    for row in rows:
        loads, steps = [Load(**row["load"])], Steps(**row["steps"])
        assert predict(loads, steps, host_for(row["gpus"])).total == pytest.approx(row["predicted_s"])
        runs = json.loads((CHECKS / f"sync_h200_{row['gpus']}.json").read_text())
        run = next(one["result"] for one in runs if one["step"] == row["run"])
        sizes = run["direct_with_buckets"] | {str(run["bucket_bytes"]): run["paths"]["direct"]}
        if row["buffers"] != run.get("buffers", 2):
            sizes = run["direct_with_buffers"][str(row["buffers"])]
        measured = sizes[str(row["bucket_bytes"])]
        assert measured["seconds"]["total"]["median"] == row["measured_s"]
        assert measured["buckets"] == steps.buckets or row["of_older_code"]


def test_arguments_that_cannot_work() -> None:
    """Refused before SGLang is imported for half a minute."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match="do not divide"):
        command.run(parser.parse_args([str(TINY), "--nproc", "3", "--tensor-model-parallel-size", "2"]))
    with pytest.raises(ConfigError, match="bucket-bytes=1 holds no element"):
        command.run(parser.parse_args([str(TINY), "--bucket-bytes", "1"]))
    with pytest.raises(SystemExit):
        parser.parse_args([str(TINY), "--nproc", "0"])
