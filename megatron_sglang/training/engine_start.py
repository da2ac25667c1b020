"""An engine from its start to the moment when the trainer's model is built, where both sit on the same devices.

    begin       the engine starts, and takes its share of a device that is empty; the trainer's imports pass meanwhile
    warm_up     it answers requests like those of the first rollout batch, in the background: rewards are started
                meanwhile, and Megatron's arguments are parsed
    make_room   that is over, and the engine's memory is given back where trainer and engine take turns

Where each has devices of its own, and on a CPU, the engine is waited for when the first weights are ready: `begin`
starts it, and the other two do nothing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sglang.config import RunConfig
from megatron_sglang.engine.background import in_thread
from megatron_sglang.memory import ENGINE_KEEPS, Ledger
from megatron_sglang.training import modes
from megatron_sglang.types import GenerateRequest, Prompt, SamplingParams

WARM_UP_TOKENS = 8
"""New tokens of each request: a few steps of all requests at once, for which no graph may have been captured."""


class EngineStart:
    """Of one run, on its leader. Errors are the engine's."""

    def __init__(self, config: RunConfig, engine: Any, show: Callable[[str], None]) -> None:
        """engine: not started yet. show: prints a line on the console."""
        self.config, self.engine, self.show = config, engine, show
        self.began = time.monotonic()
        """Seconds on the monotonic clock, before the engine is started."""
        self._first = modes.engine_first(config)
        self._ledger = Ledger.of_device() if self._first else None
        self._free = self._ledger.free() if self._ledger is not None else 0
        self._warming: concurrent.futures.Future[None] | None = None

    def begin(self, meanwhile: Callable[[], None]) -> None:
        """Start the engine, and wait for it where it comes first. meanwhile: work that takes none of the device's."""
        self.engine.start()
        modes.announce(self.config, self.engine)
        if self._first:
            meanwhile()
            modes.wait_ready(self.engine, self.show)
            self.show(f"engine ready after {self.seconds:.0f} s")

    def warm_up(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Let the engine compile what the first rollout batch needs, with these prompts, and return at once. On a CPU
        it compiles nothing."""
        if not self._first or not modes.devices() or not prompts:
            return
        sampling = dataclasses.replace(sampling, max_new_tokens=WARM_UP_TOKENS, min_new_tokens=0, stop=())
        routing_from = 0 if self.config.replays_routing else None
        requests = [
            GenerateRequest(prompt.token_ids_T, sampling, routing_from=routing_from)
            for prompt in prompts[: self.config.rollout.prompts_per_batch]
            for _ in range(self.config.rollout.samples_per_prompt)
        ]
        self._warming = in_thread(lambda: self._warm_up(requests))

    def make_room(self) -> None:
        """Before the trainer's model is built. The second time it does nothing."""
        if not self._first:
            return
        self._first = False
        if self._warming is not None:
            self._warming.result()
        if modes.choose(self.config).mode == "shared" or modes.releases(self.config):
            self.engine.release()
            if self._ledger is not None:
                self._ledger.require("start", self._free, tolerance=ENGINE_KEEPS)

    @property
    def seconds(self) -> float:
        """Since the engine was started."""
        return time.monotonic() - self.began

    def _warm_up(self, requests: Sequence[GenerateRequest]) -> None:
        began = time.monotonic()
        self.engine.warm_up(requests)
        self.show(f"engine warmed up in {time.monotonic() - began:.0f} s")
