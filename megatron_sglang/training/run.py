"""A whole run on one rank: start the engine, build Megatron's model, train with the plugin, leave nothing behind.

The engine's start and the import of Megatron take half a minute each on a CPU, so the leader starts the engine first
and waits for it when the first weights are ready. On a GPU it imports Megatron meanwhile, but waits before the model is
built, because SGLang makes its KV cache out of what it finds free (`engine_start.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sglang import agents, rewards
from megatron_sglang.agents.environment import limits_of
from megatron_sglang.comm import Board, TorchComm
from megatron_sglang.config import RunConfig
from megatron_sglang.config_check import ROUTER
from megatron_sglang.cpu import trainer as cpu_room
from megatron_sglang.cycle import Cycle, Leader
from megatron_sglang.engine import EngineOptions
from megatron_sglang.engine.controls import eos_token_ids
from megatron_sglang.engine.options import ENGINE_FIELDS, find_python
from megatron_sglang.errors import DataError
from megatron_sglang.feed.sampler import Feed
from megatron_sglang.prompts import source
from megatron_sglang.rewards.registry import WALL_PER_CPU
from megatron_sglang.rollout import Rollout
from megatron_sglang.trace import METRICS, RunLog, read_lines
from megatron_sglang.training import console, ending, hf_folder, modes
from megatron_sglang.training.engine_start import EngineStart
from megatron_sglang.types import Prompt, SamplingParams


def train(config: RunConfig) -> None:
    """Run `config` (resolved) as one of torchrun's ranks. Whatever ranks raise, all of them raise the first of it."""
    rank = int(os.environ.get("RANK", "0"))
    log, board = log_file(config), Board()
    with contextlib.ExitStack() as cleanup, ending.one_reason(board.one_error()):
        show = cleanup.enter_context(console.quiet(log) if log else console.loud())
        hf_folder.check(config.model.hf_path, weights=not config.model.random_weights)
        setup = LeaderSetup.open(config, cleanup, show) if rank == 0 else None
        cpu_room.enter()  # before anything of Megatron is imported
        _train(config, setup, board)


def log_file(config: RunConfig) -> Path | None:
    """Where this rank's output goes; None: to the console."""
    return Path(config.log.run_dir, f"rank{os.environ.get('RANK', '0')}.log") if config.log.quiet else None


def _train(config: RunConfig, setup: LeaderSetup | None, board: Board) -> None:
    """Build the model, put the plugin into Megatron's loop, and run that to its end. setup: on rank 0 only."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.checkpointing import checkpoint_exists

    from megatron_sglang.losses import LossOptions
    from megatron_sglang.training import checkpoint
    from megatron_sglang.training.model import ModelRecipe
    from megatron_sglang.training.paths import Paths
    from megatron_sglang.training.plugin import Plugin
    from megatron_sglang.training.shared import ReleasingCycle, SharedCycle, SharedPlugin, StagedPath
    from megatron_sglang.training.step import PolicyStep
    from megatron_sglang.weights.merge import in_place

    recipe = ModelRecipe(config)
    shapes, mode = _shapes(config), modes.choose(config).mode
    modes.releases(config)  # asked here because a mistake in the options must not be found only when the model is built

    def make_cycle(model_chunks: list[Any], resume_after: int | None) -> Cycle:
        comm = TorchComm(_patience(config))
        leader = setup.to_leader(resume_after) if setup is not None else None
        if not modes.engine_first(config):  # otherwise `LeaderSetup.open` has waited for it
            comm.from_leader(lambda: setup and modes.wait_ready(setup.start.engine, setup.show))
        if setup is not None:
            setup.show(f"model and engine ready after {setup.start.seconds:.0f} s")
            if recipe.args.load and not checkpoint_exists(recipe.args.load):
                setup.show(f"--load {recipe.args.load}: there is no checkpoint in it, so the run begins anew")
            if recipe.left_out:
                setup.show(f"{config.model.hf_path}: {recipe.left_out} layers for multi-token prediction are left out")
        paths = Paths(
            comm=comm,
            bridge=recipe.bridge,
            model_chunks=model_chunks,
            dtype=getattr(torch, config.model.dtype),
            bucket_bytes=config.sync.bucket_bytes,
            shapes=shapes,
            engine=leader.engine if leader is not None else None,
            engine_ranks=comm.from_leader(lambda: leader and modes.ranks_of(leader.engine)),
            hosts=modes.trainer_ranks(),
            hf_path=config.model.hf_path,
            home=str(Path(config.log.run_dir, "weights")),
            lora=config.lora,
            on_disk=not config.model.random_weights,
            say=leader.log.say if leader is not None else lambda _: None,
        )
        if mode == "shared":
            staged: Any = StagedPath(comm, paths.generic().weights, paths.engine)
            return SharedCycle(comm, staged, leader, config.algo, config.seed, None)
        path, make_direct = paths.of(config.sync.method)
        make = ReleasingCycle if modes.releases(config) else Cycle
        return make(comm, path, leader, config.algo, config.seed, make_direct)

    options = LossOptions.of(config.algo, config.rollout.max_new_tokens)
    step = PolicyStep(config.algo.loss, options, config.rollout.temperature)
    make_plugin = SharedPlugin if mode == "shared" else Plugin
    plugin = make_plugin(config, step, make_cycle, lambda chunks: in_place(recipe.bridge, chunks))
    plugin.register()
    if setup is not None:
        setup.start.make_room()
    checkpoint.require_continuable(recipe.args, config)
    board.meet()
    with checkpoint.reading(recipe.args.load):
        pretrain(
            pretrain_cfg_container_from_args(recipe.args),
            _no_dataset,
            ModelType.encoder_or_decoder,
            plugin.step.forward_step,
            recipe.model_provider,
        )
    if setup is not None and plugin.cycle is None:
        setup.show(
            f"nothing is left to train: the checkpoint in {recipe.args.load} has all of this run's rollout batches "
            f"({config.rollout.batches}); ask for more with rollout.batches"
        )
    plugin.finish()
    torch.distributed.destroy_process_group()  # after an error it might wait for ranks that are gone


def _patience(config: RunConfig) -> float:
    """Seconds that a rank waits for the leader's work, such as a rollout: longer than the leader waits for anything. A
    trajectory may come up to both of its deadlines in each turn."""
    engine, environment = config.engine, config.rollout.environment
    waits = [engine.start_timeout_s, engine.update_timeout_s, WALL_PER_CPU * config.reward.timeout_s]
    if Feed.asked_for(config):
        waits.append(float(environment.get("timeout_s", 0)))
    else:
        limits = limits_of(environment)
        waits.append(limits.max_turns * (engine.request_timeout_s + limits.step_timeout_s))
    return 3600.0 + max(waits)


def _import_trainer() -> None:
    """What `_train` imports, before it does: half a minute with Bridge and Transformer Engine, which pass while the
    engine starts. Not on a CPU, where `cpu_room.enter` must come before Megatron's import."""
    if cpu_room.needed():
        return

    from megatron.training import pretrain  # noqa: F401

    from megatron_sglang.training import model, paths, plugin, shared  # noqa: F401


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]] | None:
    """HF name -> shape of every tensor that the engine must get. None where nothing tells them: random weights of a
    model that transformers does not know."""
    from megatron_sglang.hf_files import tensor_shapes
    from megatron_sglang.plan.shapes import hub_shapes

    if not config.model.random_weights:
        return tensor_shapes(config.model.hf_path)
    with contextlib.suppress(DataError):
        return hub_shapes(Path(config.model.hf_path))
    return None


def _no_dataset(_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
    """Megatron wants a training iterator to know that it shall train; the plugin brings the real batches."""
    return iter(()), None, None


_no_dataset.is_distributed = True  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class LeaderSetup:
    """What rank 0 prepares before it has a model: the engine is started, data loaded, the reward ready. All of it is
    closed with `cleanup`. `to_leader` makes it the leader's part of the cycle."""

    config: RunConfig
    cleanup: contextlib.ExitStack
    start: EngineStart
    rollout: Rollout | agents.AgentRollout | Feed
    prompts: source.PromptSource | Feed
    held_out: tuple[Prompt, ...]
    show: Callable[[str], None]
    """Prints a line on the console."""

    @staticmethod
    def open(config: RunConfig, cleanup: contextlib.ExitStack, show: Callable[[str], None]) -> LeaderSetup:
        """Start the engine first, which takes longest, then load data and reward while it comes up."""
        if not (fed := Feed.asked_for(config)):
            agents.Environments.of(config.rollout.environment)  # an error there must not wait for an engine
        engine = modes.create(config, engine_options(config), show)
        cleanup.callback(engine.close)
        start = EngineStart(config, engine, show)
        start.begin(meanwhile=_import_trainer)
        tokenizer = source.load_tokenizer(config.model.hf_path)
        if fed:
            feed: Any = Feed.open(config, engine, tokenizer.decode)
            cleanup.callback(feed.door.close)
            show(f"{config.model.hf_path}: batches come through {feed.door.path}")
            return LeaderSetup(config, cleanup, start, feed, feed, (), show)
        train, held_out = (_prompts(config, path, tokenizer) for path in (config.data.train, config.data.eval))
        held_out = held_out[: config.rollout.eval_samples or None]
        sampling = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_new_tokens=config.rollout.max_new_tokens,
            stop_token_ids=stop_tokens(tokenizer.eos_token_id, config.model.hf_path),
            stop=config.rollout.stop,
        )
        start.warm_up(train, sampling)
        reward = rewards.create_reward(
            config.reward.name,
            sandbox="auto" if (unsafe := config.reward.sandbox == "unsafe-local") else config.reward.sandbox,
            workers=config.reward.workers,
            timeout_s=config.reward.timeout_s,
            memory_mb=config.reward.memory_mb,
            binary=config.reward.binary,
            unsafe=unsafe,
            all_pure=all(prompt.problem.get("pure", False) for prompt in (*train, *held_out)),
            lean_project=config.reward.lean_project or None,
            # An environment may score by itself, whatever its rows name.
            sources=() if config.rollout.environment else {prompt.data_source for prompt in (*train, *held_out)},
        )
        cleanup.callback(reward.close)
        count = len(modes.members(engine))
        engines = "engine" if count == 1 else f"{count} engines"
        show(
            f"{config.model.hf_path}: {len(train)} training and {len(held_out)} held-out problems, "
            f"{engines} {config.rollout.engine} tp={config.engine.tp_size}, rewards: {reward.tier}"
        )
        sampler = agents.create_rollout(
            config.rollout,
            engine=engine,
            reward=reward,
            tokenizer=tokenizer,
            sampling=sampling,
            seed=config.seed,
            say=show,
            routing=config.replays_routing,
        )
        prompts = source.PromptSource(
            train, config.rollout.prompts_per_batch, seed=config.seed, shuffle=config.data.shuffle
        )
        return LeaderSetup(config, cleanup, start, sampler, prompts, held_out, show)

    def to_leader(self, resume_after: int | None) -> Leader:
        """The leader's part of the cycle, with its log; `resume_after`: see `RunLog`."""
        log = RunLog(
            self.config.log.run_dir,
            total=self.config.rollout.batches,
            config=dataclasses.asdict(self.config),
            trackers=self.config.log.trackers,
            resume_after=resume_after,
            echo=self.show,
        )
        self.cleanup.callback(self._write_report)
        self.cleanup.callback(log.close)
        sampler = dataclasses.replace(self.rollout, span=log.span)
        return Leader(self.start.engine, sampler, self.prompts, self.held_out, log)

    def _write_report(self) -> None:
        """At the end of a run: its report page, and two lines on the console."""
        from megatron_sglang.report import write_report  # matplotlib is a second of every rank's start

        with contextlib.suppress(DataError, OSError):  # a run that failed early has none, and it must not hide why
            page = write_report(self.config.log.run_dir)
            held_out = [
                line["eval/pass_rate"] for line in read_lines(page.with_name(METRICS)) if "eval/pass_rate" in line
            ]
            if len(held_out) > 1:
                gain = 100 * (held_out[-1] - held_out[0])
                self.show(f"held-out pass rate {held_out[0]:.3f} -> {held_out[-1]:.3f}: {gain:+.1f} points")
            self.show(f"report: {page}")


def _prompts(config: RunConfig, path: str, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of one data file; none without a path."""
    if not path:
        return ()
    # A reward that is named scores every row, whatever data source the row names.
    named = "" if config.reward.name == "auto" else config.reward.name
    keys = source.Keys(**config.data.columns, data_source=named)
    loaded = source.load_prompts(
        path, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens, too_long=config.data.overlong, keys=keys
    )
    return loaded.prompts


def stop_tokens(tokenizer_eos: int, hf_path: str) -> tuple[int, ...]:
    """All tokens that end a completion in SGLang, the tokenizer's own first: models name several (Qwen3: <|im_end|> and
    <|endoftext|>), and one that is not known here would stay in the text that is scored."""
    return tuple(dict.fromkeys((tokenizer_eos, *eos_token_ids(hf_path))))


def engine_options(config: RunConfig) -> EngineOptions:
    """How an engine is started for `config`; where there are several, `engine.group.spread` gives each its devices."""
    extra = modes.extra_of(config) | config.sglang | modes.lora_of(config)
    extra.pop(ROUTER, None)
    fields = {"ep_size": "ep_size", **ENGINE_FIELDS}
    sizes = {ours: extra.pop(theirs) for theirs, ours in fields.items() if theirs in extra}
    return EngineOptions(
        model_path=config.model.hf_path,
        kind=config.rollout.engine,
        tp_size=config.engine.tp_size or 1,
        dtype=config.model.dtype,
        load_format="auto" if config.sync.method == "adapter" and not config.model.random_weights else "dummy",
        start_timeout_s=config.engine.start_timeout_s,
        request_timeout_s=config.engine.request_timeout_s,
        update_timeout_s=config.engine.update_timeout_s,
        log_path=str(Path(config.log.run_dir) / "engine.log"),
        seed=config.seed,
        deterministic=config.engine.deterministic,
        routed_experts=config.replays_routing,
        python=find_python(config.engine.python),
        extra=extra,
        **sizes,
    )
