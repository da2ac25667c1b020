"""Routing replay: in the trainer's forward passes each token goes to the experts that the engine chose for it.

In bf16 the two sides' router scores differ in their last bits, so of two near-equal experts one side takes the one and
the other side the other; the token's logprob then jumps (Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by
Aligning Training and Inference Routers", arXiv 2510.11370: rollout routing replay, R3). Only the choice is replayed:
the weights of the chosen experts are still the trainer's own scores, with their gradient.

On with Megatron's own --moe-enable-routing-replay, which gives every router a `RouterReplay`. Megatron's replays whole
tensors only; `KnownOrOwn` in its place lets the router choose where nothing is known: in the padding and for the last
token of a sequence, which the engine sampled but never processed.

    forward of a micro-batch    its experts are set, action REPLAY_FORWARD
    between two forwards        action REPLAY_BACKWARD: what is recomputed for a backward takes the oldest micro-batch's
    any other forward           none: the router's own choice (the reference policy)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import get_model_config

from megatron_sglang.batching import MicroBatch
from megatron_sglang.errors import MegatronSglangError
from megatron_sglang.metrics import Mean, Metric


class KnownOrOwn(RouterReplay):
    """Megatron's `RouterReplay` of one router that leaves tokens with a negative first expert to the router."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.counts: list[torch.Tensor] = []
        """(tokens whose router would have chosen another set, tokens replayed) of each forward that counts."""
        self.counting = False

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [tokens, top_k] and experts int64 [tokens, top_k]; called by the router for [tokens, experts]."""
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            known = self.target_topk_idx
        elif self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            known = self.replay_backward_list.pop(0)
        else:
            return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)
        assert known is not None, "it is set before the forward"
        if known.shape != (scores.shape[0], topk):
            raise MegatronSglangError(
                f"layer {self.layer_number} routes {scores.shape[0]} tokens to {topk} experts each, but the experts to "
                f"be replayed are {list(known.shape)}"
            )
        known = known.to(scores.device, torch.int64)
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            told = known[:, :1] >= 0
            chosen = torch.where(told, known, own)
            if self.counting and self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
                others = (chosen.sort(-1).values != own.sort(-1).values).any(-1)
                self.counts.append(torch.stack([others.sum(), told.sum()]).double())
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """The routers of this rank's model chunks. `install` once, when the model is built."""

    def __init__(self, routers: dict[int, list[KnownOrOwn]], shards: int, shard: int, layers: int, top_k: int) -> None:
        """routers: by id of the chunk that has them. shards: parts of a sequence that the ranks' routers see."""
        self._routers, self._shards, self._shard, self._layers, self._top_k = routers, shards, shard, layers, top_k

    @staticmethod
    def install(model_chunks: list[Any]) -> RoutingReplay | None:
        """Replaces each router's `RouterReplay`; None for a model that was built without."""
        routers = {id(chunk): [_replaced(module) for module in _routers(chunk)] for chunk in model_chunks}
        config = get_model_config(model_chunks[0])
        if not config.moe_enable_routing_replay:
            return None
        tp_size = mpu.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        tp_rank = mpu.get_tensor_model_parallel_rank() if config.sequence_parallel else 0
        return RoutingReplay(routers, tp_size, tp_rank, config.num_layers, config.moe_router_topk)

    @contextlib.contextmanager
    def of(self, chunk: Any, batch: MicroBatch, *, count: bool = False) -> Iterator[None]:
        """Around the forward of `chunk` on `batch`. count: whether `take_metrics` tells of it."""
        routers = self._routers[id(chunk)]
        if batch.routed_experts is None or not routers:
            yield
            return
        experts_SBLK = self._mine(batch.lay(batch.routed_experts))
        for router in routers:
            assert router.layer_number is not None, "it is given to each when it is made"
            router.set_target_indices(experts_SBLK[:, :, router.layer_number - 1].flatten(0, 1))
            router.counting = count
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        try:
            yield
        finally:
            for router in routers:
                router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def clear(self) -> None:
        """After the last backward, or after forwards without one: routers choose for themselves again."""
        for router in self._all:
            router.clear_indices()
            router.clear_router_replay_action()

    def take_metrics(self) -> dict[str, Metric]:
        """train/routing_disagreement of this rank's layers and tokens since the last call."""
        counts = [count for router in self._all for count in router.counts]
        for router in self._all:
            router.counts.clear()
        if not counts:
            return {}
        others, told = torch.stack(counts).sum(0).tolist()
        return {"train/routing_disagreement": Mean(others, told)}

    @property
    def _all(self) -> list[KnownOrOwn]:
        return [router for routers in self._routers.values() for router in routers]

    def _mine(self, experts_BSN: torch.Tensor) -> torch.Tensor:
        """[S / shards, B, layers, top_k] of the positions that this rank's routers see, in their order."""
        if experts_BSN.shape[2] != self._layers * self._top_k:
            raise MegatronSglangError(
                f"the engine told {experts_BSN.shape[2]} experts for each token; expected {self._top_k} for each of "
                f"{self._layers} layers: engine and trainer do not have the same model"
            )
        mine_BSN = experts_BSN.chunk(self._shards, dim=1)[self._shard]
        return mine_BSN.transpose(0, 1).unflatten(2, (self._layers, self._top_k))


def _routers(chunk: Any) -> Iterator[Any]:
    """Routers of the decoder layers; multi-token prediction, which RL does not use, keeps its own."""
    for module in chunk.modules():
        if isinstance(module, TopKRouter) and module.router_replay is not None and not module.is_mtp_layer:
            yield module


def _replaced(router: Any) -> KnownOrOwn:
    RouterReplay.global_router_replay_instances.remove(router.router_replay)
    router.router_replay = KnownOrOwn(router.layer_number)
    return router.router_replay
