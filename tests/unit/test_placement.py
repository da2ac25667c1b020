"""Rank arithmetic against Megatron's own generator's rule, written out by hand for one layout."""

from __future__ import annotations

import itertools

import pytest

from megatron_sglang.errors import ConfigError
from megatron_sglang.placement import Placement


def test_eight_ranks_tp2_pp2_ep4() -> None:
    """A wrong order would print, and later plan, transfers between the wrong ranks."""
    placement = Placement(world_size=8, tp=2, pp=2, ep=4)
    assert placement.dp == 2
    found = [(place.tp, place.dp, place.pp, place.ep, place.expert_dp) for place in map(placement.of, range(8))]
    first_stage = [(0, 0, 0, 0, 0), (1, 0, 0, 1, 0), (0, 1, 0, 2, 0), (1, 1, 0, 3, 0)]
    assert found == first_stage + [(tp, dp, 1, ep, edp) for tp, dp, _, ep, edp in first_stage]


@pytest.mark.parametrize(("tp", "cp", "pp", "ep"), list(itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4))))
def test_coordinates_name_every_rank_once(tp: int, cp: int, pp: int, ep: int) -> None:
    """Two ranks with the same coordinates would own the same shard, and another shard nobody."""
    placement = Placement(world_size=16, tp=tp, cp=cp, pp=pp, ep=ep)
    places = [placement.of(rank) for rank in range(16)]
    assert len({(place.tp, place.cp, place.dp, place.pp) for place in places}) == 16
    assert len({(place.ep, place.expert_dp, place.pp) for place in places}) == 16
    assert {place.ep for place in places} == set(range(ep))


@pytest.mark.parametrize("sizes", [{"tp": 3}, {"pp": 2, "ep": 3}, {"tp": 2, "cp": 2, "pp": 2}])
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"change --"):
        Placement(world_size=4, **sizes)
