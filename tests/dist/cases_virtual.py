"""What the forked ranks run for virtual pipeline stages: one train step, then its gradients and the weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import randomize, samples, set_up, train_steps

from megatron_sglang.comm import TorchComm
from megatron_sglang.digests import digest
from megatron_sglang.losses import LossOptions
from megatron_sglang.training import lora
from megatron_sglang.training.micro_batches import of_this_rank
from megatron_sglang.training.step import PolicyStep
from megatron_sglang.weights.adapters import Gathered
from megatron_sglang.weights.export import hf_layers


def gradients_and_weights(hf: str, layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """Into `folder`, by rank: gradients of its adapters by place in the model; merged and base weights before the step,
    by name. On the leader also the adapters themselves, as they travel. No data parallelism."""
    recipe, model, optimizer, scheduler = set_up(hf, layout)
    randomize(model, 0.05)
    weights = [
        {name: tensor.clone() for layer in hf_layers(recipe.bridge, model, merge=merge) for name, tensor in layer}
        for merge in (True, False)
    ]
    gathered = Gathered(recipe.bridge, model, TorchComm(), torch.float32)
    factors = {
        f"{name}.{index}": factor.clone()
        for layer in gathered.layers()
        for name, pair in layer.items()
        for index, factor in enumerate(pair)
    }
    gradients: dict[str, torch.Tensor] = {}
    optimizer_step = optimizer.step

    def noted() -> Any:
        for adapter in lora.adapters(model):
            for name, parameter in adapter.wrapper.adapter.named_parameters():
                place = f"{adapter.layer} {adapter.expert} {adapter.module} {name}"
                assert place not in gradients, place
                gradients[place] = parameter.main_grad.clone()
        return optimizer_step()

    optimizer.step = noted
    step = PolicyStep("gspo", LossOptions(kl_coef=0.0), temperature=1.0)
    batches = of_this_rank(samples(recipe.args.global_batch_size, 400), recipe.args)[0]
    batches = [batch.with_logprobs(old=batch.rollout_logprobs) for batch in batches]
    for _ in train_steps(step, model, optimizer, scheduler, batches, 1):
        pass
    rank = torch.distributed.get_rank()
    torch.save({"gradients": gradients, "weights": weights, "factors": factors}, Path(folder, f"{rank}.pt"))
    return {"chunks": len(model), "layers": [sorted({a.layer for a in lora.adapters([chunk])}) for chunk in model]}


def drawn_layers(hf: str, layout: dict[str, Any]) -> dict[int, list[int]]:
    """Digests of this rank's adapted base weights by layer, with weights drawn at random."""
    _, model, _, _ = set_up(hf, layout, random_weights=True)
    found: dict[int, list[int]] = {}
    for adapter in lora.adapters(model):
        found.setdefault(adapter.layer, []).append(digest(adapter.wrapper.to_wrap.weight))
    return found
