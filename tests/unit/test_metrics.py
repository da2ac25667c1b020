import json
import math

import pytest
import torch

from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.metrics import Last, Max, Mean, Metric, Sum, from_rows, merge, to_rows, values

FIRST: dict[str, Metric] = {"loss": Mean(6.0, 2), "gap": Max(0.5), "bytes": Sum(10.0), "lr": Last(0.1)}
SECOND: dict[str, Metric] = {"loss": Mean(3.0, 4), "gap": Max(0.2), "bytes": Sum(5.0), "lr": Last(0.2)}


def test_each_kind_is_reduced_its_own_way() -> None:
    """A mean of means would be (3 + .75) / 2."""
    assert values(merge([FIRST, SECOND])) == {"loss": 1.5, "gap": 0.5, "bytes": 15.0, "lr": 0.2}


def test_a_name_that_only_one_part_has_is_kept() -> None:
    assert values(merge([{"a": Sum(1.0)}, {"b": Sum(2.0)}, {"a": Sum(3.0)}])) == {"a": 4.0, "b": 2.0}


def test_a_mean_over_nothing_is_nan_and_disappears_in_a_merge() -> None:
    nothing = Mean(0.0, 0)
    assert math.isnan(nothing.value())
    assert nothing.merge(Mean(2.0, 1)).value() == 2.0


@pytest.mark.parametrize("order", [(0.5, math.nan), (math.nan, 0.5)])
def test_a_nan_is_not_hidden_by_a_maximum(order: tuple[float, float]) -> None:
    assert math.isnan(Max(order[0]).merge(Max(order[1])).value())


def test_tensors_and_floats_mix() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    merged = merge(
        [{"loss": Mean(weight * 3, torch.tensor(2)), "gap": Max(weight)}, {"loss": Mean(1.0), "gap": Max(1)}]
    )
    assert values(merged) == {"loss": 7 / 3, "gap": 2.0}


def test_what_ranks_send_each_other_merges_like_the_metrics_themselves() -> None:
    """A rank without metrics (not on the last pipeline stage) must not disturb."""
    sent = [json.loads(json.dumps(to_rows(part))) for part in (FIRST, {}, SECOND)]
    assert values(merge(from_rows(rows) for rows in sent)) == values(merge([FIRST, SECOND]))


def test_what_is_sent_holds_plain_numbers_whatever_the_dtypes() -> None:
    count, peak = torch.tensor(3), torch.tensor(0.5, dtype=torch.bfloat16)
    sent = to_rows({"loss": Mean(torch.tensor(1.5, requires_grad=True), count), "gap": Max(peak), "n": Sum(2.0)})
    assert sent == [("loss", "Mean", 1.5, 3.0), ("gap", "Max", 0.5), ("n", "Sum", 2.0)]


def test_one_name_with_two_kinds_is_refused() -> None:
    with pytest.raises(MegatronSglangError, match="'a' is a Sum in one part and a Max"):
        merge([{"a": Sum(1.0)}, {"a": Max(1.0)}])
