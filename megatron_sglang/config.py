"""Every option that is this package's own: one frozen dataclass per stage, its documentation under each field.

    RunConfig = model + lora + data + rollout + reward + algo + engine + sync + log + seed
              + `megatron` (Megatron's own arguments) + `sglang` (SGLang's own ServerArgs)

No torch, nothing heavy. `config_load.py` reads a RunConfig from YAML and the command line, `config_check.py` checks
it and fills in what follows from other values. docs/configuration.md is generated from the texts below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router"]

RouterPolicy = Literal["manual", "cache_aware", "power_of_two", "round_robin", "random"]
"""Of sglang-router: who gets a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model, frozen in this run."""

    hf_path: str
    """Folder with the model in Hugging Face format: config.json, safetensors, tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters' dtype in the trainer and in the engine. CPU runs want float32."""
    random_weights: bool = False
    """Draw the base weights at random instead of loading them; only config.json and the tokenizer are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapters, the only trained parameters."""

    rank: int = 16
    """Inner size r of each adapter."""
    alpha: float = 32.0
    """An adapter adds (alpha / rank) B A to its weight."""
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Megatron modules that get an adapter, each expert its own; `router` may be added, without tensor parallelism."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where prompts come from."""

    train: str
    """JSONL or parquet file of training problems; its columns tell the schema (FIM, verl, slime)."""
    eval: str = ""
    """File of held-out problems; empty: no evaluation."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns (slime schema) where they are not `prompt`, `label` and `metadata`, e.g. {prompt: text}."""
    max_prompt_tokens: int = 2048
    """Longest prompt admitted, in tokens."""
    overlong: Literal["error", "skip"] = "error"
    """What to do with a longer prompt."""
    shuffle: bool = True
    """Draw the problems in a new order, given by `seed`, in each epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How much is sampled, and how."""

    engine: Literal["sglang", "fake"] = "sglang"
    """Who samples. `fake` is a scriptable stand-in without a model, for tests and for debugging the loop."""
    prompts_per_batch: int = 8
    """P: prompts in a rollout batch."""
    samples_per_prompt: int = 8
    """G: completions of each prompt, the group that advantages are relative to."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's logprobs are taken at the same one."""
    top_p: float = 1.0
    """Nucleus; below 1.0 the sampler's distribution is no longer the trainer's."""
    top_k: int = -1
    """Only the k likeliest tokens; -1: all."""
    max_new_tokens: int = 1024
    """Longest completion, in tokens, its stop token included."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, or a turn, wherever they appear in it, besides the tokenizer's end token; the
    verifier sees what is before them. Several of them, or escapes: a list, '["</answer>", "\\n\\n"]'."""
    batches: int = 30
    """Rollout batches in the run."""
    mode: Literal["auto", "colocated", "split", "shared"] = "auto"
    """Engine and trainer on the same devices, on different ones, or on one in turns; auto: by what is there
    (docs/modes.md)."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What the model acts in over several turns: {name: fim_repair, max_turns: 2, ...} (docs/agents.md); empty: a
    completion is one turn."""
    over_sampling: float = 1.0
    """Groups started for each one wanted; the first to be complete are kept."""
    stragglers: Literal["abort", "resume", "resume_masked"] = "abort"
    """What becomes of the others: dropped, or continued in the next rollout batch under its weights, where the loss may
    count what older weights sampled (resume; see algo.tis) or not (resume_masked)."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, which teach nothing, and draw others in their place."""
    eval_interval: int = 0
    """Rollout batches between two evaluations; 0: only before the first and after the last."""
    eval_samples: int = 0
    """Held-out problems in an evaluation, one completion each; 0: all of data.eval."""

    @property
    def samples(self) -> int:
        """P x G: samples of a rollout batch."""
        return self.prompts_per_batch * self.samples_per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How completions are scored."""

    name: str = "auto"
    """Verifier; auto: by each problem's data source, which a data set needs for this only."""
    binary: bool = False
    """Reward 1 only where everything passes, instead of the share of checks that pass."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "restricted", "unsafe-local"] = "auto"
    """Where sampled code runs; auto: the strongest sandbox this machine has (docs/sandbox.md); unsafe-local: the same,
    and where none can be had a plain subprocess with your rights."""
    workers: int = 2
    """Completions scored at the same time."""
    timeout_s: float = 10.0
    """Longest CPU time for one completion's code, in seconds, and a third of its longest time by the clock; past it the
    completion scores 0. For Lean, and for a function of yours, whose lateness ends the run: by the clock."""
    memory_mb: int = 512
    """Memory one completion's code may use, in MiB. Lean gets at least 8192."""
    lean_project: str = ""
    """Folder of the Lake project that Lean problems are checked in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgoConfig:
    """Advantages and loss."""

    loss: Literal["gspo", "gspo_token", "grpo"] = "gspo"
    """Importance ratio per sequence (gspo), per sequence with token gradients (gspo_token), or per token (grpo)."""
    aggregation: Literal["auto", "sequence_mean", "token_mean", "constant"] = "auto"
    """How token losses become one number; auto: sequence_mean."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low are clipped; null: the loss's own, 3e-4 for gspo and gspo_token, 0.2 for grpo."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high are clipped; null: clip_low if that is given, else 4e-4 (gspo) or 0.28 (grpo)."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """A reward less its group's mean, over their standard deviation (grpo) or not (dr_grpo), or less the mean of the
    group's others (rloo)."""
    kl_coef: float | None = 0.0
    """Weight of the KL divergence from the base model in the loss; 0: only reported; null: not computed, which saves a
    forward pass per batch."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence from sampled tokens."""
    old_logprobs: Literal["adapters", "merged"] = "adapters"
    """Whose logprobs importance ratios start from: those of the model as it trains, or of its weights merged in
    model.dtype, which is what the engine serves; merged costs a forward pass per batch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss; 0: none."""
    tis: Literal["off", "token", "sequence", "masked"] = "off"
    """Truncated importance sampling, trainer against sampler: per token, per sequence, or masking what is over."""
    tis_cap: float = 2.0
    """Where those importance weights are cut."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards over the rollout batch. Nothing should be learned."""
    max_bad_steps: int = 3
    """Train steps in a row without a finite loss before the run stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The SGLang engine as this package sees it; SGLang's own options are under `sglang`."""

    tp_size: int | None = None
    """Ranks of one engine (its tensor parallelism): N trainer ranks of the node get N / tp_size engines; null: one."""
    external: tuple[str, ...] = ()
    """URLs of engines that run already; empty: engines are started and ended with the run."""
    python: str = ""
    """Interpreter of the engine's own environment; empty: of .venv-sglang-server where that exists, else this one."""
    deterministic: bool = True
    """Equal requests with equal seeds give equal tokens whatever else runs; costs speed on a GPU."""
    start_timeout_s: float = 600.0
    """Deadline for the engine to come up, in seconds."""
    request_timeout_s: float = 600.0
    """Deadline for all completions of a rollout batch, in seconds."""
    update_timeout_s: float = 300.0
    """Deadline for each call of a weight update, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How a weight version travels."""

    method: Literal["auto", "direct", "generic", "broadcast", "merge-on-engine", "adapter", "disk", "restart"] = "auto"
    """auto (or merged): merged weights straight into the engine's parameters where that proves equal to the generic
    path, else the generic one; direct: without that comparison (docs/weight_sync.md has the others)."""
    bucket_bytes: int = 480_000_000
    """Bytes per bucket; bounds the extra memory of a weight update: by default 1 GB for two buffers, also when the
    allocator rounds them up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What a run leaves behind."""

    run_dir: str = "runs/latest"
    """Folder of the run: resolved configuration, metrics, rollouts, traces, engine log, report."""
    quiet: bool = True
    """Show one line per rollout batch; what Megatron prints goes to rank<N>.log in the run folder."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where metrics go besides the run folder's own JSONL file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    """The base model."""
    data: DataConfig
    """Prompts."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Scoring."""
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    """Advantages and loss."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine's shape and deadlines."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Weight transfer."""
    log: LogConfig = field(default_factory=LogConfig)
    """Records."""
    seed: int = 1234
    """Seed of everything drawn at random: prompt order, sampling, adapters, Megatron."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Megatron's own arguments by flag name without the dashes, e.g. {lr: 3e-3, expert-model-parallel-size: 2}."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """SGLang's other ServerArgs by field name, e.g. {log_level: info}; on the command line --sglang-*."""

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def replays_routing(self) -> bool:
        """Whether the trainer replays the experts that the engine chose: Megatron's own switch says so."""
        return self.megatron.get("moe-enable-routing-replay") is True
