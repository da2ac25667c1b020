"""The plugin in Megatron's loop. All contact with `megatron.training` that is not a public argument is in this file.

`megatron.training.pretrain` (0.19.2) has no callbacks. `register` replaces three of its module globals, once:

    training.train_step        collects a new rollout batch when the last one is used up, then calls the original with
                               our micro-batches
    training.save_checkpoint   writes our state, then calls the original
    initialize._compile_dependencies
                               does nothing: the original runs `make`, and the wheel has no Makefile

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
from megatron_sglang.checkpoint_folder import folder_of, read_state, write_state
from megatron_sglang.config import RunConfig
from megatron_sglang.cycle import Cycle
from megatron_sglang.errors import SetupError
from megatron_sglang.feed.sampler import Feed
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
"""The first parameters of the functions that are replaced. They are passed on by position, so they must be these."""
_GRAD_NORM = 5
"""Where the gradient norm stands in what Megatron's train_step returns; None there if the step was skipped."""


MakeCycle = Callable[[list[Any], int | None], Cycle]
WithMerged = Callable[[list[Any]], contextlib.AbstractContextManager[None]]


class Plugin:
    """One run's rollouts inside Megatron's loop.

    make_cycle: gives the pipeline. Called once, when model and process groups exist, with the model chunks and the
    number of the last rollout batch that the loaded checkpoint has seen (None: a new run). with_merged: a context in
    which the model has merged weights, as the engine does.
    """

    def __init__(self, config: RunConfig, step: PolicyStep, make_cycle: MakeCycle, with_merged: WithMerged) -> None:
        self.config, self.step, self.make_cycle, self.with_merged = config, step, make_cycle, with_merged
        self.cycle: Cycle | None = None
        self.model: list[Any] = []
        self.guard: FiniteGuard | None = None
        self.rollout_step = 0
        """Rollout batches collected so far."""
        self.learning_rate: float | None = None
        """The one that came with the current rollout batch (`feed/`); None: Megatron's schedule decides."""
        self.pending: list[list[MicroBatch]] = []
        """Micro-batches of the train steps that the current rollout batch still feeds."""
        self.of_one_version = True
        """Whether the present weights have sampled all that the loss counts in the current rollout batch. What older
        ones have (`rollout.stragglers=resume`, now or before a checkpoint) need not agree with the trainer."""
        self.steps_done = 0
        """Train steps done on the current rollout batch, also those before the checkpoint that was loaded."""
        self.state_before_batch: dict[str, Any] = {}
        """`_rollout_state` before the current batch was collected. A checkpoint within a batch holds this one, so that
        a resumed run collects the batch again."""

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
            options: Any = get_args()
            with self.cycle.span("checkpoint"), checkpoint.writing(options.save, iteration):
                self._save_state(iteration)
                return original_save(iteration, *args, **kwargs)

        training.train_step, training.save_checkpoint = train_step, save_checkpoint
        initialize._compile_dependencies = lambda: None
        options: Any = get_args()
        if not options.async_save:
            checkpoint.write_in_process()

    def finish(self) -> None:
        """After Megatron's loop: publish the final weights and evaluate them."""
        if self.cycle is not None:
            if self.pending:  # a fed batch may be of more train steps than were left
                self.cycle.close_step(self.rollout_step - 1)
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
        """In place of Megatron's train_step, with its arguments and result. original: Megatron's own."""
        cycle = self.cycle or self._start(model, optimizer, iteration)
        if not self.pending:
            self.state_before_batch = self._rollout_state(cycle)
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
        self._note_training(cycle, grad_norm=result[_GRAD_NORM])
        cycle.note_memory("train")
        self.steps_done += 1
        if not self.pending:
            cycle.close_step(self.rollout_step - 1)
            self.steps_done = 0
        self.guard.check()
        return result

    def _start(self, model: list[Any], optimizer: Any, iteration: int) -> Cycle:
        """Before the first train step, when everything is built; goes on where the loaded checkpoint stands."""
        self.model = model
        self.guard = FiniteGuard(optimizer, self.config.algo.max_bad_steps)
        self.step.replay = RoutingReplay.install(model)
        if not iteration:
            self.cycle = self.make_cycle(model, None)
        else:
            args: Any = get_args()
            state = read_state(folder_of(args.load, iteration))
            self.rollout_step, self.steps_done = state["rollout_step"], state.get("trained", 0)
            self.cycle = self.make_cycle(model, self.rollout_step - 1)
            self.cycle.restore(state["cycle"])
            if self.steps_done and Feed.asked_for(self.config):
                # Whoever feeds gives another batch than the one that was cut off, and all of it is to be trained on.
                # What was sampled for that one, by the weights before its first train steps, has a version of its own.
                self.steps_done = 0
                self.cycle.version += 1
        self.cycle.note_memory("build")
        return self.cycle

    def _next_rollout(self, cycle: Cycle) -> list[list[MicroBatch]]:
        """Publish, sample, score: this rank's micro-batches by train step.

        If the loaded checkpoint was saved within a batch, the prompts of that batch are sampled again, by the weights
        that its first train steps have made, and feed only the train steps that are left. A batch that is fed (`feed/`)
        is another one, and feeds all of its own.
        """
        cycle.publish()
        interval = self.config.rollout.eval_interval
        if self.rollout_step == 0 or (interval and self.rollout_step % interval == 0):
            cycle.evaluate()
        samples = cycle.collect(self.rollout_step)
        self.rollout_step += 1
        self.of_one_version = all(sample.is_of(cycle.version) for sample in samples)
        cycle.add({"train/tokens": metrics.Sum(float(sum(sample.length for sample in samples)))})
        with cycle.span("batches"):
            batches = micro_batches.of_this_rank(samples, get_args())[self.steps_done :]
        del samples  # with the experts of other ranks' tokens
        with cycle.span("logprobs"):
            batches = self._with_logprobs(cycle, batches)
        cycle.note_memory("logprobs")
        cycle.before_training()
        return batches

    def _with_logprobs(self, cycle: Cycle, by_step: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Add the logprobs that the loss compares the policy with, on the last pipeline stage, where it is computed.

        Old ones: in the first train step the policy still is the one that sampled, so its own logprobs are the old ones
        (`MicroBatch.loss_inputs`), and only later steps need a forward pass. With algo.old_logprobs=merged all steps
        get them, by the model as the engine has it. Reference ones, where there is a KL: by the model without adapters,
        whose own routers choose the experts.
        """
        flat = [batch for step in by_step for batch in step]
        temperature, merged = self.config.rollout.temperature, self.config.algo.old_logprobs == "merged"
        first = 0 if merged else len(by_step[0])
        if scored := flat[first:]:
            with cycle.span("old"), self.with_merged(self.model) if merged else contextlib.nullcontext():
                old = logprobs.score(self.model, scored, temperature, self.step.replay)
            flat[first:] = [batch.with_logprobs(old=old[i]) if old else batch for i, batch in enumerate(scored)]
        if self.config.algo.kl_coef is not None:
            with cycle.span("reference"), lora.disabled(self.model):
                ref = logprobs.score(self.model, flat, temperature)
            flat = [batch.with_logprobs(ref=ref[i]) if ref else batch for i, batch in enumerate(flat)]
        rest = iter(flat)
        return [list(islice(rest, len(step))) for step in by_step]

    def _note_training(self, cycle: Cycle, grad_norm: float | None) -> None:
        """Metrics of all micro-batches of all data-parallel ranks, added up; every rank computes the same sums."""
        parts = self.step.take_metrics()  # on all ranks, or they would pile up
        if mpu.get_tensor_model_parallel_rank():  # ranks of a TP group have the same ones, which count once
            parts = []
        if self.step.replay is not None:  # each rank has layers or tokens of its own
            parts.append(self.step.replay.take_metrics())
        rows = cycle.comm.gather([metrics.to_rows(part) for part in parts])
        merged = metrics.merge(metrics.from_rows(row) for rank in rows for row in rank)
        alike = self.config.rollout.engine != "fake" and self.of_one_version
        if (gap := merged.get("train/logprob_gap_mean")) is not None and alike:
            require_agreement(gap.value(), getattr(torch, self.config.model.dtype))
        cycle.add(merged | ({} if grad_norm is None else {"train/grad_norm": metrics.Mean(grad_norm)}))

    def _rollout_state(self, cycle: Cycle) -> dict[str, Any]:
        return {"rollout_step": self.rollout_step, "cycle": cycle.state()}

    def _save_state(self, iteration: int) -> None:
        """Write our part of the checkpoint: `rollout_state.json`."""
        assert self.cycle is not None
        args: Any = get_args()
        state = (self.state_before_batch if self.pending else self._rollout_state(self.cycle)) | {
            "trained": self.steps_done,
            "lora": dataclasses.asdict(self.config.lora),  # for `megatron-sglang convert`, with dtype
            "dtype": self.config.model.dtype,
        }
        self.cycle.comm.from_leader(lambda: write_state(folder_of(args.save, iteration), state))


def _rerunnable(model: list[Any], batches: list[MicroBatch]) -> Any:
    """As `logprobs.iterators`, in the class that Megatron wants, since it may run a train step twice."""
    iterators = [RerunDataIterator(iter(batches)) for _ in model]
    return iterators if len(iterators) > 1 else iterators[0]
