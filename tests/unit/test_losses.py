"""Values by hand, gradients against a loop over Python floats, and the promises of the module's docstring."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sglang.config import AlgoConfig
from megatron_sglang.errors import ConfigError
from megatron_sglang.losses import LOSS_NAMES, LossInputs, LossOptions, LossOutputs, kl, policy_loss
from megatron_sglang.metrics import merge, values

KL_AND_TIS = LossOptions(kl_coef=0.1, entropy_coef=0.01, tis="token", tis_cap=1.5, clip_low=0.1, clip_high=0.2)


def random_inputs(batch: int = 5, width: int = 7, seed: int = 0) -> LossInputs:
    """Logprobs up to 0.5 nats apart; sequence i has a response of i + 1 tokens somewhere in the row."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(batch, width, generator=generator, dtype=torch.float64) * scale

    old = -noise(1.0).abs() - 0.1
    mask = torch.zeros(batch, width, dtype=torch.float64)
    for row in range(batch):
        start = row % 2
        mask[row, start : start + min(row + 1, width - start)] = 1
    return LossInputs(
        logprobs=(old + noise(0.2)).requires_grad_(),
        old_logprobs=old,
        mask=mask,
        advantages=noise(1.0)[:, 0],
        ref_logprobs=old + noise(0.3),
        rollout_logprobs=old + noise(0.3),
        entropy=noise(1.0).abs().requires_grad_(),
    )


def naive_loss(name: str, x: LossInputs, options: LossOptions, low: float, high: float) -> Tensor:
    """The mean loss, written token by token."""
    sequences: list[list[Tensor]] = []
    for b in range(x.mask.shape[0]):
        response = [t for t in range(x.mask.shape[1]) if x.mask[b, t]]
        log_ratios = [x.logprobs[b, t] - x.old_logprobs[b, t] for t in response]
        mean_ratio = torch.stack(log_ratios).mean().exp()
        gaps = [x.old_logprobs[b, t] - x.rollout_logprobs[b, t] for t in response]  # type: ignore[index]
        terms = []
        for t, log_ratio, gap in zip(response, log_ratios, gaps, strict=True):
            ratio = {
                "grpo": log_ratio.exp(),
                "gspo": mean_ratio,
                "gspo_token": mean_ratio.detach() * (x.logprobs[b, t] - x.logprobs[b, t].detach()).exp(),
            }[name]
            clipped = min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high))
            term = -min(ratio * x.advantages[b], clipped * x.advantages[b])
            weight = math.exp({"off": 0.0, "token": gap, "sequence": sum(gaps), "masked": gap}[options.tis])
            if options.tis == "masked":
                weight = weight if 1 / options.tis_cap <= weight <= options.tis_cap else 0.0
            term = term * min(weight, options.tis_cap)
            if options.kl_coef:
                delta = x.ref_logprobs[b, t] - x.logprobs[b, t]  # type: ignore[index]
                estimate = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - 1 - delta}[options.kl_estimator]
                term = term + options.kl_coef * estimate
            if options.entropy_coef:
                term = term - options.entropy_coef * x.entropy[b, t]  # type: ignore[index]
            terms.append(term)
        sequences.append(terms)
    total = {
        "sequence_mean": lambda: sum(sum(terms) / len(terms) for terms in sequences) / len(sequences),
        "token_mean": lambda: sum(sum(terms) for terms in sequences) / sum(len(terms) for terms in sequences),
        "constant": lambda: sum(sum(terms) for terms in sequences) / (len(sequences) * (options.longest_response or 0)),
    }[options.aggregation]()
    assert isinstance(total, Tensor)
    return total


VARIANTS = [
    *((name, LossOptions()) for name in LOSS_NAMES),
    *((name, KL_AND_TIS) for name in LOSS_NAMES),
    ("grpo", LossOptions(aggregation="token_mean", kl_coef=0.5, kl_estimator="k2")),
    ("grpo", LossOptions(aggregation="constant", longest_response=9, kl_coef=0.5, kl_estimator="k1")),
    ("gspo", LossOptions(clip_low=0.1, tis="sequence", tis_cap=1.2)),
    ("grpo", LossOptions(tis="masked", tis_cap=1.25)),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_value_and_gradient_equal_a_loop_over_tokens(name: str, options: LossOptions) -> None:
    inputs = random_inputs()
    out = policy_loss(name, inputs, options)
    default_low, default_high = (0.2, 0.28) if name == "grpo" else (3e-4, 4e-4)
    low = default_low if options.clip_low is None else options.clip_low
    high = options.clip_high or options.clip_low or default_high
    expected = naive_loss(name, inputs, options, low, high)
    torch.testing.assert_close(out.loss_sum / out.denominator, expected, rtol=1e-12, atol=1e-14)

    assert inputs.entropy is not None
    wanted = torch.autograd.grad(expected, [inputs.logprobs, inputs.entropy], allow_unused=True)
    got = torch.autograd.grad(out.loss_sum / out.denominator, [inputs.logprobs, inputs.entropy], allow_unused=True)
    for ours, naive in zip(got, wanted, strict=True):
        assert (ours is None) == (naive is None)
        if naive is not None:
            torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-14)
    assert got[0].abs().max() > 0


def two_tokens(advantage: float, **more: Tensor) -> LossInputs:
    """One sequence; behind a masked token, token ratios 2 and 1, whose geometric mean is sqrt 2."""
    old = torch.tensor([[-9.0, -2.0, -1.0]], dtype=torch.float64)
    new = old + torch.tensor([[5.0, math.log(2), 0.0]], dtype=torch.float64)
    mask = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    return LossInputs(new.requires_grad_(), old, mask, torch.tensor([advantage], dtype=torch.float64), **more)


@pytest.mark.parametrize(
    ("name", "advantage", "expected", "clipped_share"),
    [
        ("gspo", 1.0, -1.0004, 1.0),
        ("gspo", -1.0, math.sqrt(2), 0.0),
        ("gspo_token", 1.0, -1.0004, 1.0),
        ("grpo", 1.0, -(1.28 + 1.0) / 2, 0.5),
        ("grpo", -3.0, 3 * (2.0 + 1.0) / 2, 0.0),
    ],
)
def test_values_by_hand(name: str, advantage: float, expected: float, clipped_share: float) -> None:
    out = policy_loss(name, two_tokens(advantage))
    assert out.loss_sum.item() == pytest.approx(expected, abs=1e-12)
    assert (out.denominator.item(), out.denominator.dtype) == (1, torch.int64)
    numbers = values(out.metrics)
    assert numbers["train/clip_fraction"] == pytest.approx(clipped_share)
    assert numbers["train/ratio"] == pytest.approx(1.5 if name == "grpo" else math.sqrt(2))
    assert numbers["train/response_length"] == 2
    assert numbers["train/kl_old_k1"] == pytest.approx(-math.log(2) / 2)
    assert numbers["train/kl_old"] == pytest.approx((2 - 1 - math.log(2)) / 2)


def test_a_clipped_sequence_gets_no_gradient_and_an_unclipped_one_ratio_times_advantage_over_length() -> None:
    clipped, free = two_tokens(1.0), two_tokens(-1.0)
    policy_loss("gspo", clipped).loss_sum.backward()
    policy_loss("gspo", free).loss_sum.backward()
    assert clipped.logprobs.grad is not None
    assert free.logprobs.grad is not None
    assert clipped.logprobs.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert free.logprobs.grad.tolist() == [[0.0, pytest.approx(math.sqrt(2) / 2), pytest.approx(math.sqrt(2) / 2)]]


def test_aggregations_by_hand() -> None:
    """Responses of 1 and 3 tokens, ratio 1, advantages 1 and 5: means 1 and 5; tokens 1 and 15."""
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    logprobs = torch.full((2, 3), -1.0)
    inputs = LossInputs(logprobs, logprobs, mask, torch.tensor([1.0, 5.0]))

    def parts(options: LossOptions) -> tuple[float, int]:
        out = policy_loss("grpo", inputs, options)
        return out.loss_sum.item(), int(out.denominator)

    assert parts(LossOptions()) == (-6.0, 2)
    assert parts(LossOptions(aggregation="token_mean")) == (-16.0, 4)
    assert parts(LossOptions(aggregation="constant", longest_response=8)) == (-2.0, 2)


def test_kl_estimators_by_hand() -> None:
    """ref / policy = 1/2: k1 = ln 2, k2 = ln(2)^2 / 2, k3 = 1/2 - 1 + ln 2."""
    policy, ref = torch.tensor(math.log(0.5)).double(), torch.tensor(math.log(0.25)).double()
    assert kl(policy, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl(policy, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl(policy, ref, "k3").item() == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize(
    ("tis", "weights"), [("off", [1.0, 1.0]), ("token", [2.0, 0.25]), ("sequence", [0.75, 0.75]), ("masked", [0, 0])]
)
def test_importance_weights_by_hand(tis: str, weights: list[float]) -> None:
    """Trainer over engine 3 and 1/4, cap 2: capped at 2 and kept; product 3/4 for both; both outside [1/2, 2]."""
    old = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    rollout = old - torch.tensor([[3.0, 0.25]], dtype=torch.float64).log()
    new = old.clone().requires_grad_()
    inputs = LossInputs(new, old, torch.ones(1, 2), torch.ones(1), rollout_logprobs=rollout)
    out = policy_loss("grpo", inputs, LossOptions(tis=tis))  # type: ignore[arg-type]
    out.loss_sum.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [pytest.approx([-weight / 2 for weight in weights])]
    numbers = values(out.metrics)
    assert numbers["train/tis_weight"] == pytest.approx(sum(weights) / 2)
    assert numbers["train/logprob_gap_max"] == pytest.approx(math.log(4))
    assert numbers["train/logprob_gap_mean"] == pytest.approx((math.log(3) + math.log(4)) / 2)
    assert numbers["train/token_mult_prob_error"] == pytest.approx((3 + 4) / 2)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("log_ratio", [-0.5, -0.1, 0.1, 0.5])
def test_gspo_is_grpo_for_responses_of_one_token(advantage: float, log_ratio: float) -> None:
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    options = LossOptions(clip_low=0.2, clip_high=0.28)
    results = []
    for name in LOSS_NAMES:
        new = (old + log_ratio).requires_grad_()
        out = policy_loss(name, LossInputs(new, old, torch.ones(1, 1), torch.tensor([advantage]).double()), options)
        out.loss_sum.backward()
        assert new.grad is not None
        results.append((out.loss_sum.item(), new.grad.item()))
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])


def test_gspo_token_equals_gspo_in_value_and_gradient() -> None:
    """Section 4.3 of the paper: with one advantage per sequence they differ only in how they can be extended."""
    inputs = random_inputs()
    gspo, token = (policy_loss(name, inputs) for name in ("gspo", "gspo_token"))
    torch.testing.assert_close(gspo.loss_sum, token.loss_sum)
    gradients = [torch.autograd.grad(out.loss_sum, inputs.logprobs)[0] for out in (gspo, token)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_values_never_leak(name: str, bad: float) -> None:
    """Padding holds whatever the model gave there; the loss, all metrics and the gradients must not notice."""
    clean = random_inputs()
    hole = clean.mask == 0

    def spoil(value: Tensor | None) -> Tensor:
        assert value is not None
        return value.detach().masked_fill(hole, bad)

    dirty = replace(
        clean,
        logprobs=spoil(clean.logprobs).requires_grad_(),
        old_logprobs=spoil(clean.old_logprobs),
        ref_logprobs=spoil(clean.ref_logprobs),
        rollout_logprobs=spoil(clean.rollout_logprobs),
        entropy=spoil(clean.entropy),
    )
    expected, got = policy_loss(name, clean, KL_AND_TIS), policy_loss(name, dirty, KL_AND_TIS)
    assert got.loss_sum.item() == expected.loss_sum.item()
    assert values(got.metrics) == values(expected.metrics)
    got.loss_sum.backward()
    expected.loss_sum.backward()
    assert dirty.logprobs.grad is not None
    assert clean.logprobs.grad is not None
    assert dirty.logprobs.grad.equal(clean.logprobs.grad)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages"])
def test_a_bad_value_of_the_response_shows_in_loss_and_gradient(name: str, bad: float, field: str) -> None:
    """An infinite ratio would otherwise be clipped to a harmless-looking number."""
    inputs = random_inputs()
    value = getattr(inputs, field).detach().clone()
    value[(4,) if field == "advantages" else (4, 1)] = bad
    inputs = replace(inputs, logprobs=inputs.logprobs.detach().requires_grad_())
    inputs = replace(inputs, **{field: value.requires_grad_() if field == "logprobs" else value})
    loss = policy_loss(name, inputs, KL_AND_TIS).loss_sum
    loss.backward()
    assert inputs.logprobs.grad is not None
    assert loss.isnan()
    assert inputs.logprobs.grad[4, 1].isnan()


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_is_not_hidden_by_the_clip(name: str, advantage: float) -> None:
    new = torch.tensor([[-1.0]], requires_grad=True)
    inputs = LossInputs(new, torch.tensor([[-200.0]]), torch.ones(1, 1), torch.tensor([advantage]))
    loss = policy_loss(name, inputs).loss_sum
    loss.backward()
    assert new.grad is not None
    assert loss.isnan()
    assert new.grad.isnan().all()


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_only_the_policys_own_outputs_get_gradients(name: str) -> None:
    """Old, reference and engine logprobs, and advantages, are constants even if a caller forgot to detach them."""
    inputs = random_inputs()
    constants = {
        field: getattr(inputs, field).clone().requires_grad_()
        for field in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages")
    }
    policy_loss(name, replace(inputs, **constants), KL_AND_TIS).loss_sum.backward()
    assert inputs.logprobs.grad is not None
    assert [field for field, value in constants.items() if value.grad is not None] == []


def test_a_bad_engine_logprob_does_not_stop_training_when_it_is_only_measured() -> None:
    inputs = random_inputs()
    assert inputs.rollout_logprobs is not None
    rollout = inputs.rollout_logprobs.clone()
    rollout[4, 1] = math.nan
    out = policy_loss("gspo", replace(inputs, rollout_logprobs=rollout))
    assert out.loss_sum.isfinite()
    assert math.isnan(values(out.metrics)["train/logprob_gap_max"])


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_micro_batches_add_up_to_the_whole_batch(name: str) -> None:
    """Otherwise the micro-batch size would change the training."""
    inputs = random_inputs()
    whole = policy_loss(name, inputs, KL_AND_TIS)
    parts = [policy_loss(name, _part(inputs, rows), KL_AND_TIS) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert sum(int(part.denominator) for part in parts) == int(whole.denominator)
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)
    merged = values(merge(part.metrics for part in parts))
    assert merged == pytest.approx(values(whole.metrics))


def test_a_sequence_without_response_does_not_count() -> None:
    inputs = random_inputs()
    empty = replace(inputs, mask=torch.cat([inputs.mask[:2], torch.zeros_like(inputs.mask[2:])]))
    empty = replace(empty, advantages=torch.cat([inputs.advantages[:2], torch.full((3,), math.nan).double()]))
    two, five = policy_loss("gspo", _part(inputs, slice(0, 2))), policy_loss("gspo", empty)
    assert (two.denominator.item(), five.denominator.item()) == (2, 2)
    torch.testing.assert_close(two.loss_sum, five.loss_sum)
    none = policy_loss("gspo", replace(empty, mask=torch.zeros_like(inputs.mask)))
    none.loss_sum.backward()
    assert (none.loss_sum.item(), none.denominator.item()) == (0.0, 0)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_sequences_split_over_context_ranks_give_the_same_loss_and_gradient(name: str, options: LossOptions) -> None:
    """Two threads stand for two ranks; their hook adds the parts with the graph of both, as a differentiable
    all-reduce does. What Megatron divides are the sums over both."""
    inputs = random_inputs()
    whole = policy_loss(name, inputs, options)
    wanted = torch.autograd.grad(whole.loss_sum / whole.denominator, inputs.logprobs)[0]

    halves = [_part(inputs, columns=slice(0, 3)), _part(inputs, columns=slice(3, 7))]
    outs = _on_context_ranks(halves, lambda half, hook: policy_loss(name, half, options, hook))
    loss = sum(out.loss_sum for out in outs) / sum(out.denominator for out in outs)
    torch.testing.assert_close(loss, whole.loss_sum / whole.denominator)
    got = torch.autograd.grad(loss, inputs.logprobs)[0]
    torch.testing.assert_close(got, wanted)
    assert values(merge(out.metrics for out in outs)) == pytest.approx(values(whole.metrics))


def test_half_precision_logprobs_are_summed_in_fp32() -> None:
    inputs = random_inputs()
    low = replace(inputs, logprobs=inputs.logprobs.detach().bfloat16().requires_grad_())
    assert policy_loss("gspo", low).loss_sum.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy_loss("ppo", random_inputs()), "'ppo' is unknown; use one of gspo"),
        (lambda: policy_loss("gspo", random_inputs(), LossOptions(aggregation="token_mean")), "use sequence_mean"),
        (lambda: policy_loss("gspo", two_tokens(1.0), LossOptions(kl_coef=0.1)), "needs ref_logprobs"),
        (lambda: policy_loss("gspo", two_tokens(1.0), LossOptions(tis="token")), "needs rollout_logprobs"),
        (lambda: policy_loss("gspo", two_tokens(1.0), LossOptions(entropy_coef=0.1)), "needs entropy"),
        (lambda: LossOptions(kl_estimator="k4"), "use k1 or k2 or k3"),  # type: ignore[arg-type]
        (lambda: LossOptions(aggregation="constant"), "longest_response=None"),
        (lambda: LossOptions(tis_cap=0.5), "tis_cap=0.5"),
        (lambda: LossOptions(clip_low=1.5), "clip_low=1.5"),
        (lambda: LossOptions(clip_high=-0.1), "clip_high=-0.1"),
    ],
)
def test_wrong_options_name_their_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_run_configuration_gives_the_options_it_names() -> None:
    algo = AlgoConfig(loss="grpo", aggregation="constant", clip_low=0.1, kl_coef=0.2, kl_estimator="k2", tis="masked")
    options = LossOptions.of(algo, longest_response=24)
    expected = {"aggregation": "constant", "longest_response": 24, "clip_low": 0.1, "clip_high": None, "kl_coef": 0.2}
    assert {name: getattr(options, name) for name in expected} == expected
    assert (options.kl_estimator, options.tis) == ("k2", "masked")
    assert LossOptions.of(AlgoConfig(), 24) == LossOptions(longest_response=24)


def _part(inputs: LossInputs, rows: slice = slice(None), columns: slice = slice(None)) -> LossInputs:
    names = ("logprobs", "old_logprobs", "mask", "ref_logprobs", "rollout_logprobs", "entropy")
    cut = {name: getattr(inputs, name)[rows, columns] for name in names}
    return replace(inputs, advantages=inputs.advantages[rows], **cut)


def _on_context_ranks(
    halves: list[LossInputs], loss: Callable[[LossInputs, Callable[[Tensor], Tensor]], LossOutputs]
) -> list[LossOutputs]:
    barrier = threading.Barrier(2, timeout=20)
    parts: dict[int, Tensor] = {}

    def run(rank: int) -> LossOutputs:
        def hook(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        return loss(halves[rank], hook)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))
