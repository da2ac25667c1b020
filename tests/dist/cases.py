"""What the forked ranks run: each function is one rank's part of a case, and returns JSON values."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_sglang.cpu import trainer as cpu_room

cpu_room.enter()

import math
import random
import re
import signal
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import preload  # noqa: F401
import torch
from megatron.core import parallel_state as mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_sglang import batching, config_check
from megatron_sglang.config import DataConfig, LoraConfig, ModelConfig, RolloutConfig, RunConfig
from megatron_sglang.hf_files import tensor_shapes
from megatron_sglang.losses import LossOptions
from megatron_sglang.training import lora
from megatron_sglang.training.micro_batches import counted
from megatron_sglang.training.model import ModelRecipe
from megatron_sglang.training.plugin import _rerunnable
from megatron_sglang.training.step import PolicyStep
from megatron_sglang.types import TrainSample

initialize._compile_dependencies = lambda: None


def make_config(
    hf: str, layout: dict[str, Any], random_weights: bool = False, dtype: Literal["float32", "bfloat16"] = "float32"
) -> RunConfig:
    """8 x 2 samples, one train step; `layout` are Megatron flags."""
    sizes = {"micro-batch-size": 2, "lr": 1e-2, "min-lr": 1e-2, "lr-decay-style": "constant", "clip-grad": 1.0}
    config = RunConfig(
        model=ModelConfig(hf_path=hf, dtype=dtype, random_weights=random_weights),
        data=DataConfig(train="-", max_prompt_tokens=40),
        lora=LoraConfig(rank=8, alpha=16),
        rollout=RolloutConfig(max_new_tokens=24, prompts_per_batch=8, samples_per_prompt=2, batches=10),
        megatron=sizes | layout,
    )
    world = int(os.environ["WORLD_SIZE"])
    config_check.check(config, local_world_size=world)
    return config_check.resolve(config, local_world_size=world)


def set_up(
    hf: str, layout: dict[str, Any], random_weights: bool = False, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[ModelRecipe, list[Any], Any, Any]:
    """Megatron's own set-up of model, optimizer and schedule."""
    recipe = ModelRecipe(make_config(hf, layout, random_weights, dtype))
    training.initialize_megatron()
    torch.rand(torch.distributed.get_rank())  # as in a run, where the leader has drawn more than the others
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=recipe.model_provider,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(recipe.args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return recipe, model, optimizer, scheduler


def randomize(model: list[Any], scale: float) -> None:
    """Give every adapter's B values that do not depend on the layout."""
    for adapter in lora.adapters(model):
        weight = adapter.wrapper.adapter.linear_out.weight
        dense = adapter.expert is None
        tp_size = mpu.get_tensor_model_parallel_world_size() if dense else 1
        tp_rank = mpu.get_tensor_model_parallel_rank() if dense else 0
        key = repr((adapter.layer, adapter.expert, adapter.module))
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        whole = torch.randn(weight.shape[0] * tp_size, weight.shape[1], generator=generator) * scale
        weight.data.copy_(whole.chunk(tp_size)[tp_rank])


def samples(count: int, vocabulary: int) -> list[TrainSample]:
    draw = random.Random(7)
    made = []
    for _ in range(count):
        prompt = tuple(draw.randrange(5, vocabulary) for _ in range(draw.randint(5, 40)))
        response = tuple(draw.randrange(5, vocabulary) for _ in range(draw.randint(2, 24)))
        logprobs = tuple(-draw.random() * 4 for _ in response)
        made.append(TrainSample(prompt, response, logprobs, draw.gauss(0, 1), 0.0, 1))
    return made


def train(
    hf: str, layout: dict[str, Any], loss: str = "gspo", iterations: int = 3, on_policy: bool = False
) -> list[list[float]]:
    """[loss, grad norm] of each train step on fixed samples, on every rank (loss: NaN except on the last stage)."""
    recipe, model, optimizer, scheduler = set_up(hf, layout)
    randomize(model, 0.05)
    args = recipe.args
    step = PolicyStep(loss, LossOptions(kl_coef=0.0), temperature=1.0)
    by_step = batching.split(
        samples(args.global_batch_size, 400),
        global_batch=args.global_batch_size,
        micro_batch=args.micro_batch_size,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
    )
    batches = [batching.collate(part, 8) for part in by_step[0]]
    # The sampler's logprobs stand in for old ones, so that ratios, clips and gradients differ from sample to sample.
    if not on_policy:
        batches = [batch.with_logprobs(old=batch.rollout_logprobs) for batch in batches]
    steps = train_steps(step, model, optimizer, scheduler, batches, iterations)
    return [[float(result[0].get(f"{loss} loss", math.nan)), float(result[5])] for result in steps]


def train_steps(
    step: PolicyStep, model: list[Any], optimizer: Any, scheduler: Any, batches: list[Any], iterations: int
) -> Iterator[Any]:
    """What Megatron's train_step returns, of so many steps on the same micro-batches."""
    config = training.get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = training.finalize_model_grads
    for iteration in range(iterations):
        yield training.train_step(
            step.forward_step,
            _rerunnable(model, batches),
            model,
            optimizer,
            scheduler,
            config,
            counted(get_forward_backward_func(), len(batches)),
            iteration=iteration,
        )


def logits(model: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Full logits [B, S, V] on the last pipeline stage, None elsewhere."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)

    def forward(_iterator: Any, chunk: Any) -> Any:
        return chunk(tokens, positions, None), lambda output, non_loss_data=False: output

    interleaved = len(model) > 1
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(()) for _ in model] if interleaved else iter(()),
            model=model,
            num_microbatches=mpu.get_pipeline_model_parallel_world_size() if interleaved else 1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return gather_from_tensor_model_parallel_region(found[0]) if mpu.is_pipeline_last_stage() else None


def merged_export(hf: str, layout: dict[str, Any]) -> dict[str, float]:
    """Largest difference between Megatron's logits and those of transformers on the merged weights."""
    import transformers

    from megatron_sglang.weights.export import hf_layers

    recipe, model, _, _ = set_up(hf, layout)
    randomize(model, 0.2)
    weights = {name: tensor.clone() for layer in hf_layers(recipe.bridge, model) for name, tensor in layer}
    tokens = torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(5))
    ours = logits(model, tokens)
    if ours is None:
        return {}
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        base = reference(tokens).logits
        load_hf(reference, weights)
        merged = reference(tokens).logits
    return {
        "difference": float((merged - ours).abs().max()),
        "moved": float((merged - base).abs().max()),
        "tensors": len(weights),
    }


def load_hf(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load hub-named weights into a transformers model, which keeps the experts of a layer in one tensor."""
    state = dict(weights)
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in list(state):
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = state.pop(name)
    for prefix, by_expert in experts.items():
        ordered = [by_expert[number] for number in range(len(by_expert))]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in ordered])
        state[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in ordered])
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, result.missing_keys


def run(argv: list[str], kill_at: int | None = None, bad_steps: tuple[int, ...] = ()) -> str:
    """A whole run, as pretrain_gspo.py makes it. kill_at: SIGKILL every rank before that Megatron iteration.
    bad_steps: Megatron iterations whose gradients are made NaN. The error's class and text, or ""."""
    from megatron_sglang import config_load
    from megatron_sglang.errors import MegatronSglangError
    from megatron_sglang.training import guard
    from megatron_sglang.training import run as training_run

    original = guard.FiniteGuard.watch

    def watch(self: Any, forward_backward: Any) -> Any:
        iteration = int(training.get_args().curr_iteration)
        if iteration == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

        def spoiled(*args: Any, model: list[Any], **kwargs: Any) -> Any:
            losses = forward_backward(*args, model=model, **kwargs)
            if iteration in bad_steps and mpu.get_data_parallel_rank() == 0:
                model[0].buffers[0].grad_data[0] = math.nan
            return losses

        return original(self, spoiled)

    guard.FiniteGuard.watch = watch  # type: ignore[method-assign]
    try:
        training_run.train(config_load.split_argv(argv).config)
    except MegatronSglangError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def direct(
    hf: str,
    layout: dict[str, Any],
    engine_ranks: int,
    limit: int,
    hosts: int | None = None,
    fused: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    buffers: int = 2,
) -> dict[str, Any]:
    """Send to engine ranks that each want a strange rectangle of every tensor; compare with the generic export. fused:
    both merge by the GPU's kernel."""
    from megatron_sglang import digests
    from megatron_sglang.transfer import Box, Place, Region, cut, incoming, make_plan
    from megatron_sglang.weights import merge, shards
    from megatron_sglang.weights.direct import DirectSender
    from megatron_sglang.weights.export import hf_layers

    recipe, model, _, _ = set_up(hf, layout, dtype=dtype)
    sent_as = getattr(torch, dtype)
    merge._is_on_gpu = digests.is_on_gpu = lambda _: fused
    randomize(model, 0.2)
    shapes = tensor_shapes(hf)
    mine = shards.of_this_rank(recipe.bridge, model, shapes)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    wanted = []
    for name, shape in shapes.items():
        rows, cols = shape if len(shape) == 2 else (shape[0], 1)
        for rank in range(engine_ranks):
            cut_at = [rows * part // (engine_ranks + 1) for part in range(engine_ranks + 2)]
            box = Box(cut_at[rank], cols // 3 * (rank % 2), cut_at[rank + 2] - cut_at[rank], cols - cols // 3)
            wanted.append(Region(rank, name, box, Place(f"engine.{name}", 0, box.cols, 1)))
    plan = make_plan([shard for part in everyone for shard in part], wanted, hosts or len(everyone))
    full = {name: tensor.clone() for layer in hf_layers(recipe.bridge, model) for name, tensor in layer}
    merge._is_on_gpu = lambda _: False
    by_torch = {name: tensor.clone() for layer in hf_layers(recipe.bridge, model) for name, tensor in layer}
    off = max(float((full[name] - tensor).abs().max()) for name, tensor in by_torch.items())
    merge._is_on_gpu = lambda _: fused
    sender = DirectSender(recipe.bridge, model, cut(plan, limit), sent_as, shapes, hosts, buffers)
    wrong, elements = 0, 0
    rank, ranks = torch.distributed.get_rank(), hosts or len(everyone)
    received: dict[tuple[int, str], torch.Tensor] = {}
    boxes = {(region.rank, region.name): region.box for region in wanted if region.rank % ranks == rank}
    freed: list[int] = []
    for delivery in sender.deliveries(freed.append, lambda: False):
        # The buffer so many deliveries back is the one that was overwritten, and it was asked for first.
        assert freed == list(range(delivery.index + 1 - buffers)), (freed, delivery.index)
        at = 0
        for piece in incoming(sender.buckets[delivery.index], delivery.target):
            box = boxes[key := (delivery.target, piece.name)]
            target = received.setdefault(key, torch.full((box.rows, box.cols), math.nan, dtype=sent_as))
            strides = (piece.there.row_stride, piece.there.col_stride)
            view = target.view(-1).as_strided((piece.rows, piece.cols), strides, piece.there.offset)
            wrong += int((~view.isnan()).sum())
            view.copy_(delivery.data[at : at + piece.size].view(piece.rows, piece.cols))
            at += piece.size
        assert at == delivery.data.numel()
        found = digests.digests(delivery.data.split(delivery.lengths))
        both = zip(delivery.lengths, found, delivery.digests, strict=True)
        assert all(got == sent for length, got, sent in both if length)
        elements += at
    for (target, name), box in boxes.items():
        whole = full[name] if full[name].dim() == 2 else full[name][:, None]
        expected = whole[box.row : box.row + box.rows, box.col : box.col + box.cols]
        wrong += int((received[target, name] != expected).sum())
    ended_after = 0
    for _ in sender.deliveries(lambda _: None, lambda: rank == len(everyone) - 1 and ended_after >= 2):  # noqa: B023
        ended_after += 1
    return {
        "wrong": wrong,
        "ended_after": ended_after,
        "off": off,
        "fused": len(sender._fused),
        "in_segments": sum(found is not None for found in sender._segments.values()),
        "elements": elements,
        "wanted": sum(b.size for b in boxes.values()),
        "buckets": len(sender.buckets),
    }


def shards_of_this_rank(hf: str, layout: dict[str, Any]) -> tuple[list[list[Any]], int]:
    """What a real Megatron model holds, as rows of regions; and the parameters of its adapters."""
    from megatron_sglang.transfer import row_of
    from megatron_sglang.weights import shards

    recipe, model, _, _ = set_up(hf, layout)
    adapters = sum(parameter.numel() for parameter in model[0].parameters() if parameter.requires_grad)
    return [row_of(shard) for shard in shards.of_this_rank(recipe.bridge, model, tensor_shapes(hf))], adapters


def merged_in_place(hf: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Logits by adapters, by weights merged for a while, and by adapters again; are base and adapters as before?"""
    from megatron_sglang.weights.merge import in_place

    recipe, model, _, _ = set_up(hf, layout)
    randomize(model, 0.2)
    tokens = torch.tensor([[5, 40, 300, 77, 12, 9, 200, 31]])
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    by_adapters = logits(model, tokens)
    with in_place(recipe.bridge, model):
        merged = logits(model, tokens)
        moved = sum(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    again = logits(model, tokens)
    restored = all(torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    with lora.disabled(model):
        base = logits(model, tokens)
    if by_adapters is None or merged is None or again is None or base is None:
        return {"moved": moved, "restored": restored}
    return {
        "moved": moved,
        "restored": restored and torch.equal(by_adapters, again),
        "difference": float((by_adapters - merged).abs().max()),
        "learned": float((by_adapters - base).abs().max()),
    }


def drawn_weights(hf: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Digests of the base weights that this rank drew at random, and the names of what is exported."""
    from megatron_sglang.digests import digest
    from megatron_sglang.weights.export import hf_layers

    recipe, model, _, _ = set_up(hf, layout, random_weights=True)
    drawn = {name: digest(weight) for name, weight in model[0].named_parameters() if ".adapter." not in name}
    return {"drawn": drawn, "exported": sorted(name for layer in hf_layers(recipe.bridge, model) for name, _ in layer)}
