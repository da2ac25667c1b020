"""The plugin in Megatron's loop. All contact with `megatron.training` that is not a public argument is in this file.

`megatron.training.pretrain` (0.19.2) has no callbacks. `register` replaces two of its module globals, once:

    training.train_step        a new rollout batch when the last is used up, then the original with our micro-batches
    training.save_checkpoint   our state first, then the original
    initialize._compile_dependencies   nothing: it runs `make` in a folder that the wheel ships without a Makefile

Rollouts never happen in the data iterator: with PP > 1 the first stage would wait in a collective for a last stage
that waits for the first one's activations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args, initialize, training

from megatron_sglang import metrics
from megatron_sglang.batching import MicroBatch
from megatron_sglang.config import RunConfig
from megatron_sglang.cycle import Cycle
from megatron_sglang.errors import SetupError
from megatron_sglang.sync import require_agreement
from megatron_sglang.training import checkpoint, leftovers, logprobs, lora, micro_batches, rates
from megatron_sglang.training.guard import FiniteGuard
from megatron_sglang.training.replay import RoutingReplay
from megatron_sglang.training.step import PolicyStep

_EXPECTED = {
    "train_step": (
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration "
        "pg_collection p2p_communicator"
    ),
    "save_checkpoint": "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far",
}


MakeCycle = Callable[[list[Any], int | None], Cycle]
WithMerged = Callable[[list[Any]], contextlib.AbstractContextManager[None]]


class Plugin:
    """One run's rollouts inside Megatron's loop.

    make_cycle: called once, when model and process groups exist, with the model chunks and the last rollout batch that
    the loaded checkpoint has seen (None: a new run); gives the pipeline. with_merged: makes the model one with merged
    weights for a while.
    """

    def __init__(self, config: RunConfig, step: PolicyStep, make_cycle: MakeCycle, with_merged: WithMerged) -> None:
        self.config, self.step, self.make_cycle, self.with_merged = config, step, make_cycle, with_merged
        self.cycle: Cycle | None = None
        self.model: list[Any] = []
        self.guard: FiniteGuard | None = None
        self.rollout_step = 0
        """Rollout batches collected so far."""
        self.learning_rate: float | None = None
        """That came with the current rollout batch; None: Megatron's schedule."""
        self.pending: list[list[MicroBatch]] = []
        """Micro-batches of the train steps that the current rollout batch still feeds."""
        self.trained = 0
        """Its train steps that were done, here or before the checkpoint that was loaded."""
        self.before: dict[str, Any] = {}
        """What a checkpoint says of the rollouts while the current batch is in use: that it is still to come."""

    def register(self) -> None:
        """Put the plugin into Megatron's loop. SetupError when Megatron is not the one this was written for."""
        for name, expected in _EXPECTED.items():
            found = " ".join(inspect.signature(getattr(training, name)).parameters)
            if not found.startswith(expected):
                raise SetupError(
                    f"megatron.training.{name} takes ({found}), the plugin expects ({expected} ...); "
                    "install the pinned megatron-core"
                )
        original_step, original_save = training.train_step, training.save_checkpoint

        def train_step(
            _forward_step: Any, _iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any
        ) -> Any:
            return self._train_step(original_step, model, optimizer, *args, **kwargs)

        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
            if self.cycle is None:  # nothing was left to train: the checkpoint that was loaded is the last one
                return None
            with self.cycle.span("checkpoint"), checkpoint.writing(get_args().save, iteration):
                self._save_state(iteration)
                return original_save(iteration, *args, **kwargs)

        training.train_step, training.save_checkpoint = train_step, save_checkpoint
        initialize._compile_dependencies = lambda: None
        if not get_args().async_save:
            checkpoint.write_in_process()

    def finish(self) -> None:
        """After Megatron's loop: publish the final weights and evaluate them."""
        if self.cycle is not None:
            self.cycle.publish()
            self.cycle.evaluate()
            self.cycle.close_step(self.rollout_step)

    # ---- one Megatron iteration ----

    def _train_step(
        self,
        original: Callable[..., Any],
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        config: Any,
        forward_backward: Callable[..., Any],
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        cycle = self.cycle or self._start(model, optimizer, iteration)
        if not self.pending:
            self.before = self._rollout_state(cycle)
            self.pending = self._next_rollout(cycle)
            self.learning_rate = cycle.learning_rate()
        if self.learning_rate is not None:
            rates.set_learning_rate(optimizer, self.learning_rate)
            cycle.add({"train/learning_rate": metrics.Last(self.learning_rate)})
        assert self.guard is not None
        batches = self.pending.pop(0)
        cycle.add({"train/micro_batches": metrics.Mean(len(batches))})
        with cycle.span("train"):
            result = original(
                self.step.forward_step,
                _rerunnable(model, batches),
                model,
                optimizer,
                scheduler,
                config,
                self.guard.watch(micro_batches.counted(forward_backward, len(batches))),
                iteration=iteration,
                **kwargs,
            )
        leftovers.drop(model)
        if self.step.replay is not None:
            self.step.replay.clear()
        self._note_training(cycle, grad_norm=result[5])
        cycle.note_memory("train")
        self.trained += 1
        if not self.pending:
            cycle.close_step(self.rollout_step - 1)
            self.trained = 0
        self.guard.check()
        return result

    def _start(self, model: list[Any], optimizer: Any, iteration: int) -> Cycle:
        self.model = model
        self.guard = FiniteGuard(optimizer, self.config.algo.max_bad_steps)
        self.step.replay = RoutingReplay.install(model)
        if not iteration:
            self.cycle = self.make_cycle(model, None)
        else:
            state = checkpoint.read_state(get_args().load, iteration)
            self.rollout_step, self.trained = state["rollout_step"], state.get("trained", 0)
            self.cycle = self.make_cycle(model, self.rollout_step - 1)
            self.cycle.restore(state["cycle"])
        self.cycle.note_memory("build")
        return self.cycle

    def _next_rollout(self, cycle: Cycle) -> list[list[MicroBatch]]:
        """Publish, sample, score: this rank's micro-batches by train step.

        Of a batch that a checkpoint was saved in the prompts are sampled again, by the weights that its first train
        steps have made, and feed those that are left.
        """
        cycle.publish()
        interval = self.config.rollout.eval_interval
        if self.rollout_step == 0 or (interval and self.rollout_step % interval == 0):
            cycle.evaluate()
        samples = cycle.collect(self.rollout_step)
        self.rollout_step += 1
        cycle.add({"train/tokens": metrics.Sum(float(sum(sample.length for sample in samples)))})
        with cycle.span("batches"):
            batches = micro_batches.of_this_rank(samples, get_args())[self.trained :]
        del samples  # with the experts of other ranks' tokens
        with cycle.span("logprobs"):
            batches = self._with_logprobs(cycle, batches)
        cycle.note_memory("logprobs")
        return batches

    def _with_logprobs(self, cycle: Cycle, by_step: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Old logprobs for all train steps but the first, for which they are the policy's own, or for all of them where
        those of the merged weights are wanted; reference ones where the KL is, by the base's own routing. Only the last
        pipeline stage holds them, and only there the loss is computed."""
        flat = [batch for step in by_step for batch in step]
        temperature, merged = self.config.rollout.temperature, self.config.algo.old_logprobs == "merged"
        fresh = 0 if merged else len(by_step[0])
        if later := flat[fresh:]:
            with cycle.span("old"), self.with_merged(self.model) if merged else contextlib.nullcontext():
                old = logprobs.score(self.model, later, temperature, self.step.replay)
            flat[fresh:] = [batch.with_logprobs(old=old[i]) if old else batch for i, batch in enumerate(later)]
        if self.config.algo.kl_coef is not None:
            with cycle.span("reference"), lora.disabled(self.model):
                ref = logprobs.score(self.model, flat, temperature)
            flat = [batch.with_logprobs(ref=ref[i]) if ref else batch for i, batch in enumerate(flat)]
        rest = iter(flat)
        return [list(islice(rest, len(step))) for step in by_step]

    def _note_training(self, cycle: Cycle, grad_norm: float | None) -> None:
        """Metrics of all micro-batches of all data-parallel ranks, added up on the leader."""
        parts = self.step.take_metrics()  # on all ranks, or they would pile up
        if mpu.get_tensor_model_parallel_rank():
            parts = []
        if self.step.replay is not None:  # each rank has layers or tokens of its own
            parts.append(self.step.replay.take_metrics())
        rows = cycle.comm.gather([metrics.to_rows(part) for part in parts])
        merged = metrics.merge(metrics.from_rows(row) for rank in rows for row in rank)
        # Tokens that older weights sampled are not expected to agree with this version's.
        alike = self.config.rollout.engine != "fake" and self.config.rollout.stragglers != "resume"
        if (gap := merged.get("train/logprob_gap_mean")) is not None and alike:
            require_agreement(gap.value(), getattr(torch, self.config.model.dtype))
        cycle.add(merged | ({} if grad_norm is None else {"train/grad_norm": metrics.Mean(grad_norm)}))

    def _rollout_state(self, cycle: Cycle) -> dict[str, Any]:
        return {"rollout_step": self.rollout_step, "cycle": cycle.state()}

    def _save_state(self, iteration: int) -> None:
        assert self.cycle is not None
        args = get_args()
        state = (self.before if self.pending else self._rollout_state(self.cycle)) | {
            "trained": self.trained,
            "lora": dataclasses.asdict(self.config.lora),  # for `megatron-sglang convert`, with dtype
            "dtype": self.config.model.dtype,
        }
        self.cycle.comm.from_leader(lambda: checkpoint.write_state(args.save, iteration, state))


def _rerunnable(model: list[Any], batches: list[MicroBatch]) -> Any:
    iterators = [RerunDataIterator(iter(batches)) for _ in model]
    return iterators if len(iterators) > 1 else iterators[0]
