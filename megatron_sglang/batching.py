"""From samples to micro-batches, padded or packed, and which rank trains on which sample. Torch only.

Alignment: entry t of `labels`, `loss_mask`, `advantages`' sequence and every logprob tensor is about the token at
position t + 1, which is what a language model predicts at position t:

    tokens     p0 p1 p2 r0 r1 __        prompt of 3, response of 2, padded to 6
    labels     p1 p2 r0 r1  0  0
    loss_mask   0  0  1  1  0  0
    logprobs    0  0 l0 l1  0  0
    experts    e0 e1 e2 e3 -1 -1        those of the token at the same place: no engine processed r1

Order: the samples of a rollout batch stay in their list's order. Train step s takes the s-th run of `global_batch`
samples; of these data-parallel rank d takes the d-th run of `global_batch / dp_size`; its micro-batches are
consecutive runs of `micro_batch`. So the samples of a step are the same for any dp_size. By a budget of tokens
(`packing.py`) a step has the same samples too; which rank and micro-batch gets which of them goes by length.

Packed: what the model gets is one sequence [1, T] of all samples, each with the padding that its ranks need to cut it,
while everything about losses stays [B, S]:

    [B, S]  p0 p1 r0 __ __ __         lay      [1, T]  p0 p1 r0 __ p0 p1 p2 r0 r1 __
            p0 p1 p2 r0 r1 __          ->              spans (4, 6); `spread` is the way back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import batched

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_sglang import packing
from megatron_sglang.errors import ConfigError, EngineError
from megatron_sglang.losses import LossInputs
from megatron_sglang.metrics import Mean
from megatron_sglang.types import RoutedExperts, TrainSample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B samples padded to S positions. [B, S] unless said otherwise; fp32 where not int64."""

    tokens: Tensor
    """int64, 0 in the padding."""
    labels: Tensor
    """int64, the next token; 0 where there is none."""
    position_ids: Tensor
    """int64, 0 .. S - 1 in each row."""
    loss_mask: Tensor
    """1 where the label is a response token that the policy sampled."""
    rollout_logprobs: Tensor
    """Of the labels, from the engine; 0 outside the response."""
    advantages: Tensor
    """[B]"""
    lengths: Tensor
    """[B] int64, tokens of prompt and response."""
    spans: tuple[int, ...]
    """[B] positions that the model computes for each sample, on all context-parallel ranks together."""
    packed: bool = False
    """Whether the model gets the samples as one sequence."""
    context_size: int = 1
    """Context-parallel ranks that hold parts of each sample."""
    routed_experts: Tensor | None = None
    """[B, S, layers x top_k] int8, or int16 where a number needs it; of the tokens, from the engine; -1 where it told
    none: in the padding and for the last token. Stays on the host: each rank needs little of it at a time."""
    old_logprobs: Tensor | None = None
    """Of the labels, from the trainer before its first step on the batch; set by `with_logprobs`. None: the policy's
    own, as for that first step."""
    ref_logprobs: Tensor | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        tensors = {name: value for name, value in self._tensors().items() if name != "routed_experts"}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})

    def with_logprobs(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> MicroBatch:
        """The same batch with logprobs [B, S] the trainer has computed."""
        old = self.old_logprobs if old is None else old
        ref = self.ref_logprobs if ref is None else ref
        return replace(self, old_logprobs=old, ref_logprobs=ref)

    def of_context_rank(self, rank: int, size: int) -> MicroBatch:
        """What context-parallel rank `rank` of `size` holds: [B, S] becomes [B, S / size].

        Of 2 x size equal pieces of each sample's positions it is the `rank`-th from either end, so that causal
        attention costs all ranks the same: the order of Megatron and Transformer Engine. Spans must be multiples of
        2 x size.
        """
        if size == 1:
            return self
        for span in self.spans:
            assert span % (2 * size) == 0, f"{span} positions do not divide into 2 x {size} pieces"

        def part(row: Tensor, span: int) -> Tensor:
            pieces = row[:span].chunk(2 * size)
            return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])

        cut = {
            name: pad_sequence(
                [part(row, span) for row, span in zip(value, self.spans, strict=True)],
                batch_first=True,
                padding_value=-1 if name == "routed_experts" else 0,
            )
            for name, value in self._tensors().items()
            if value.dim() > 1
        }
        return replace(self, context_size=size, **cut)

    def lay(self, value: Tensor) -> Tensor:
        """[B, S, ...] as the model gets it: [1, T, ...] where packed, T the sum of this rank's parts of the spans."""
        if not self.packed:
            return value
        return torch.cat([row[:width] for row, width in zip(value, self._widths(), strict=True)]).unsqueeze(0)

    def spread(self, value: Tensor) -> Tensor:
        """What the model gives for each position, as [B, S]: inverse of `lay` with 0 in the padding, differentiable."""
        return pad_sequence(list(value[0].split(self._widths())), batch_first=True) if self.packed else value

    def padding(self) -> Mean:
        """The share of positions computed for no token."""
        computed = sum(self.spans)
        return Mean(computed - self.lengths.sum(), float(computed))

    def _widths(self) -> list[int]:
        return [span // self.context_size for span in self.spans]

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def loss_inputs(self, logprobs: Tensor, entropy: Tensor | None = None) -> LossInputs:
        """Inputs of the loss for the policy's logprobs [B, S]. Where the batch has no old logprobs the policy's own
        stand for them, without gradient: in the first step on the batch it is the policy that sampled, and all ratios
        are 1."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        return LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            mask=self.loss_mask,
            advantages=self.advantages,
            ref_logprobs=self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs,
            entropy=entropy,
        )


def collate(samples: Sequence[TrainSample], multiple_of: int = 1, packed: bool = False) -> MicroBatch:
    """Pad samples to the longest of them, rounded up to `multiple_of`. packed: the model will get them as one sequence,
    in which each is rounded up by itself. Nothing is ever cut off.
    """
    width = packing.aligned(max(sample.length for sample in samples), multiple_of)
    shape = (len(samples), width)
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    loss_mask, rollout_logprobs = torch.zeros(shape), torch.zeros(shape)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.prompt_ids_T + sample.response_ids_T)
        response = slice(len(sample.prompt_ids_T) - 1, sample.length - 1)
        tokens[row, : sample.length] = ids
        labels[row, : sample.length - 1] = ids[1:]
        loss_mask[row, response] = torch.tensor(sample.loss_mask_T or (1,) * len(sample.response_ids_T)).float()
        rollout_logprobs[row, response] = torch.tensor(sample.rollout_logprobs_T)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(width).expand(shape).contiguous(),
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        advantages=torch.tensor([sample.advantage for sample in samples]),
        lengths=torch.tensor([sample.length for sample in samples]),
        spans=tuple(packing.aligned(sample.length, multiple_of) if packed else width for sample in samples),
        packed=packed,
        routed_experts=_routed(samples, width),
    )


def expert_numbers(routed: RoutedExperts) -> Tensor:
    """The engine's bytes as a tensor, uint8 or int16 [tokens, layers x top_k]."""
    dtype = torch.uint8 if routed.width == 1 else torch.int16
    return torch.frombuffer(bytearray(routed.data), dtype=dtype).view(routed.tokens, -1)


def _routed(samples: Sequence[TrainSample], width: int) -> Tensor | None:
    """`MicroBatch.routed_experts`; None where no sample has them. `EngineError` where only some have, or they
    differ."""
    told = [expert_numbers(sample.routed_experts) for sample in samples if sample.routed_experts is not None]
    if len(told) < len(samples) or not told:
        if told:
            raise EngineError(f"the engine told the experts of {len(told)} of {len(samples)} samples; expected all")
        return None
    if len(sizes := {experts_TN.shape[1] for experts_TN in told}) > 1:
        raise EngineError(f"the engine told different numbers of experts for a token: {sorted(sizes)}")
    narrow = all(experts_TN.dtype is torch.uint8 and int(experts_TN.amax()) < 128 for experts_TN in told)
    dtype = torch.int8 if narrow else torch.int16
    padded = torch.full((len(samples), width, told[0].shape[1]), -1, dtype=dtype)
    for row, experts_TN in enumerate(told):
        padded[row, : len(experts_TN)] = experts_TN
    return padded


def split[T](
    items: Sequence[T], *, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[list[list[T]]]:
    """This rank's items by train step and micro-batch: [steps][micro-batches][micro_batch].

    Raises `ConfigError` for sizes that would leave items over.
    """
    if len(items) % global_batch or global_batch % (micro_batch * dp_size) or not items:
        raise ConfigError(
            f"{len(items)} samples of a rollout batch do not divide into train steps of {global_batch} "
            f"(--global-batch-size) over {dp_size} data-parallel ranks in micro-batches of {micro_batch} "
            "(--micro-batch-size); "
            "prompts x samples must be a multiple of the first, the first of the product of the others"
        )
    per_rank = global_batch // dp_size
    starts = range(dp_rank * per_rank, len(items), global_batch)
    return [[list(part) for part in batched(items[start : start + per_rank], micro_batch)] for start in starts]


def split_by_tokens(
    samples: Sequence[TrainSample],
    *,
    global_batch: int,
    budget: int,
    multiple_of: int,
    dp_rank: int,
    dp_size: int,
    run: int = 1,
) -> list[list[list[TrainSample]]]:
    """This rank's samples by train step and micro-batch; a micro-batch has at most `budget` tokens, with each sample
    rounded up to `multiple_of`. run: the number of micro-batches is a multiple of it (`packing.micro_batches`). Raises
    `ConfigError` as `split` does."""
    split(samples, global_batch=global_batch, micro_batch=run, dp_rank=dp_rank, dp_size=dp_size)
    found = []
    for step in batched(samples, global_batch):
        lengths = [packing.aligned(sample.length, multiple_of) for sample in step]
        mine = packing.micro_batches(lengths, budget, dp_size, run)[dp_rank]
        found.append([[step[place] for place in part] for part in mine])
    return found
