import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sglang.batching import collate, split
from megatron_sglang.errors import ConfigError
from megatron_sglang.losses import policy_loss
from megatron_sglang.types import TrainSample


def sample(prompt: tuple[int, ...], response: tuple[int, ...], advantage: float = 1.0) -> TrainSample:
    logprobs = tuple(-0.25 * (place + 1) for place in range(len(response)))
    return TrainSample(prompt, response, logprobs, advantage, reward=1.0, weight_version=3)


def test_the_example_of_the_module() -> None:
    """An off-by-one here trains on the wrong tokens and looks almost right."""
    batch = collate([sample((11, 12, 13), (21, 22), 0.5), sample((14,), (23,), -1.0)], multiple_of=6)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 0], [14, 23, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[12, 13, 21, 22, 0, 0], [23, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -0.25, -0.5, 0, 0], [-0.25, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [list(range(6))] * 2
    assert batch.advantages.tolist() == [0.5, -1.0]
    assert batch.lengths.tolist() == [5, 2]


samples = st.lists(
    st.builds(
        sample,
        st.lists(st.integers(1, 500), min_size=1, max_size=9).map(tuple),
        st.lists(st.integers(1, 500), min_size=0, max_size=9).map(tuple),
        st.floats(-2, 2, width=32),
    ),
    min_size=1,
    max_size=6,
)


@given(samples, st.integers(1, 16))
def test_every_response_token_is_found_again_under_the_mask(items: list[TrainSample], multiple_of: int) -> None:
    batch = collate(items, multiple_of=multiple_of)
    assert batch.tokens.shape[1] % multiple_of == 0
    assert 0 <= batch.tokens.shape[1] - max(item.length for item in items) < multiple_of
    for row, item in enumerate(items):
        inside = batch.loss_mask[row].bool()
        assert tuple(batch.labels[row][inside].tolist()) == item.response_ids_T
        assert tuple(batch.rollout_logprobs[row][inside].tolist()) == item.rollout_logprobs_T
        assert not batch.rollout_logprobs[row][~inside].any()
        whole = tuple(batch.tokens[row, : batch.lengths[row]].tolist())
        assert whole == item.prompt_ids_T + item.response_ids_T
        assert tuple(batch.labels[row, : len(whole) - 1].tolist()) == whole[1:]


def test_loss_inputs_carry_the_trainers_logprobs_once_they_are_known() -> None:
    batch = collate([sample((1, 2), (3, 4), 1.0)])
    policy = torch.full_like(batch.loss_mask, -1.0).requires_grad_()
    on_policy = policy_loss("gspo", batch.loss_inputs(policy))
    assert on_policy.loss_sum.item() == -1.0
    known = batch.with_logprobs(old=policy.detach() - math.log(2)).with_logprobs(ref=policy.detach() - 3.0)
    inputs = known.loss_inputs(policy, entropy=torch.ones_like(policy))
    assert inputs.ref_logprobs is not None
    assert inputs.ref_logprobs.tolist() == (policy - 3.0).tolist()
    assert inputs.rollout_logprobs is batch.rollout_logprobs
    assert policy_loss("gspo", inputs).loss_sum.item() == pytest.approx(-1.0004)


def test_moving_a_batch_moves_all_of_it() -> None:
    batch = collate([sample((1, 2), (3, 4))]).with_logprobs(old=torch.zeros(1, 4)).to("meta")
    assert {batch.tokens.device.type, batch.lengths.device.type, batch.loss_mask.device.type} == {"meta"}
    assert batch.old_logprobs is not None
    assert batch.old_logprobs.device.type == "meta"
    assert batch.ref_logprobs is None


sizes = st.integers(1, 4)


@given(steps=sizes, dp_size=sizes, micros=sizes, micro_batch=sizes)
def test_ranks_share_every_item_once_and_joining_restores_the_order(
    steps: int, dp_size: int, micros: int, micro_batch: int
) -> None:
    global_batch = dp_size * micros * micro_batch
    items = list(range(steps * global_batch))
    by_rank = [
        split(items, global_batch=global_batch, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert [item for step in zip(*by_rank, strict=True) for rank in step for part in rank for item in part] == items
    for rank in by_rank:
        assert [len(step) for step in rank] == [micros] * steps
        assert all(len(part) == micro_batch for step in rank for part in step)
    for step in range(steps):
        seen = sorted(item for rank in by_rank for part in rank[step] for item in part)
        assert seen == items[step * global_batch : (step + 1) * global_batch]


def test_split_by_hand() -> None:
    """16 items, steps of 8, 2 ranks, micro-batches of 2: rank 1 takes the second half of each step."""
    parts = split(range(16), global_batch=8, micro_batch=2, dp_rank=1, dp_size=2)
    assert parts == [[[4, 5], [6, 7]], [[12, 13], [14, 15]]]


@pytest.mark.parametrize(("total", "global_batch", "dp_size"), [(12, 8, 2), (16, 8, 3), (0, 8, 2)])
def test_sizes_that_leave_items_over_are_refused(total: int, global_batch: int, dp_size: int) -> None:
    with pytest.raises(ConfigError, match=f"{total} samples of a rollout batch do not divide"):
        split(range(total), global_batch=global_batch, micro_batch=2, dp_rank=0, dp_size=dp_size)


def test_context_ranks_hold_pieces_from_both_ends() -> None:
    """Megatron's rotary embedding and Transformer Engine's attention take this order for granted; in another one each
    position attends to the wrong ones, without an error."""
    samples = [TrainSample((1, 2, 3), tuple(range(4, 4 + 11)), (-1.0,) * 11, 1.0, 0.0, 1)]
    whole = collate(samples, 16)
    parts = [whole.of_context_rank(rank, 2) for rank in range(2)]
    assert [part.position_ids[0].tolist() for part in parts] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
    for part in parts:
        assert torch.equal(part.tokens, whole.tokens[:, part.position_ids[0]])
        assert torch.equal(part.rollout_logprobs, whole.rollout_logprobs[:, part.position_ids[0]])
        assert part.old_logprobs is None
        assert torch.equal(part.advantages, whole.advantages)
    assert whole.of_context_rank(0, 1) is whole
    with pytest.raises(AssertionError, match="do not divide"):
        whole.of_context_rank(0, 3)
