"""Peak memory of a GPU by phase, from shapes, placement and a few sizes of the run. Pure; 10^9 bytes are a GB.

    build     weights, adapters, gradients and fp32 copies are there; the engine is, or has given its memory back
    train     the same, Adam's state, activations, logits; the engine as while building
    sync      weights, adapters, buffers of the update (`plan/update.py`); the engine's weights and KV cache
    rollout   weights, adapters; the engine with its graphs

What stands for the trainer is what it has in tensors (memory/<phase>_allocated_gb of a run): torch's allocator holds
more, for which the device's numbers allow (`KEPT`). Exact are weights, adapters, gradients, optimizer and buffers;
`GUESSES` and what a recomputed layer takes are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_sglang.placement import Placement
from megatron_sglang.plan.trainer import Shapes, Trainer, is_adapted

GB = 10**9
H200_BYTES = 150_110_000_000
"""Of one H200, by cudaMemGetInfo (benchmarks/results/offload_h200.json: 139.8 GiB)."""
GUESSES = {"context": 1 * GB, "nccl": 2 * GB, "graphs": 3 * GB}
"""context: of each process, trainer and engine; nccl: the same, where there are several ranks; graphs: CUDA graphs and
activations of the engine, beside its share of the memory. Only sums were measured, as what is not free after a release,
less what the trainer's allocator holds: 9.2 GB on two GPUs (cycle_replay_h200_2.json), 4.7 on one (cycle_h200_1.json).
"""
KEPT = {"build": 0.0, "train": 1.5, "sync": 0.75, "rollout": 0.75}
"""Bytes of the device that torch's allocator holds beside its tensors, for a byte that comes and goes in a train step
(inputs, a recomputed layer, logits), sizes rounded as in a run (`host.ROUNDED`): experts get other numbers of tokens in
each layer, so blocks of many sizes pile up. Fitted to medians of runs on two GPUs (cycle_replay_h200_2.json: 1.6 and
0.7) and on one, where all tokens of a layer stay (cycle_h200_1.json: 0.6 and 0.9); under pressure it gives them back,
so this is what a run takes, not what it needs."""
KEPT_WHOLE = 0.05
"""The same of a train step that keeps what layers have made, for a byte of all tensors: they lie there in the order
they were made in, and what comes after fits into what they leave (cycle_block_h200_2.json: 0.05, 31 of 48 layers
recomputed; recompute_h200_2.json: 0.03 to 0.08)."""
LOGIT_COPIES = 2
"""In the logits' dtype, at the peak: themselves and their gradient; with several sequences in a micro-batch also that
gradient in the order of the output layer, of which one sequence is a view. fp32 exists in the registers of a kernel
only (`training/score_kernel.py`)."""
LAYER_PASSES = 2
"""A recomputed layer's tensors, and as much for their gradients: a guess."""
ADAM_BYTES, MAIN_BYTES, GRADIENT_BYTES = 8, 4, 4
"""Of each adapter parameter, in fp32: two moments, the copy that is stepped, the gradient. The first two are split over
data-parallel ranks (distributed optimizer)."""


@dataclass(frozen=True, slots=True)
class Job:
    """The sizes of a run that placement does not say."""

    micro_batch: int = 1
    sequence: int = 3072
    """Longest prompt and completion together, in tokens."""
    lora_rank: int = 32
    itemsize: int = 2
    """Of weights, adapters, activations and logits, in bytes."""
    experts_per_token: int = 0
    mem_fraction: float = 0.3
    """The engine's share of the device for weights and KV cache."""
    releases: bool = True
    """Does the engine give that back while the trainer trains?"""
    recomputed: int | None = None
    """Layers of a pipeline stage that are computed again in the backward pass (Megatron's --recompute-method block);
    what the others have made is kept. None: all layers."""
    device_bytes: int = H200_BYTES


@dataclass(frozen=True, slots=True)
class Trained:
    """What one rank's trainer holds, in bytes."""

    weights: int
    adapters: int
    gradients: int
    main: int
    """fp32 copies of this rank's part of the adapters."""
    adam: int
    inputs: int
    """Of the layers that are recomputed, for the micro-batches in flight."""
    kept: int
    """What the other layers have made, for the same."""
    layer: int
    """One layer's tensors, computed again, with their gradients: a guess."""
    logits: int
    """0 but on the last pipeline stage."""

    @property
    def standing(self) -> int:
        """Between train steps, after the first."""
        return self.weights + self.adapters + self.gradients + self.main + self.adam

    @property
    def passing(self) -> int:
        """At the peak of a train step: logits are gone before a layer is computed again."""
        return self.inputs + self.kept + max(self.layer, self.logits)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one rank, in bytes by phase."""

    trained: Trained
    trainer: Mapping[str, int]
    """What the trainer has in tensors."""
    device: Mapping[str, int]
    """With the engine's processes, `KEPT` and `GUESSES`."""


def peaks_of(shapes: Shapes, trainer: Trainer, job: Job, buffers: Sequence[int], engine: bool = True) -> list[Peaks]:
    """By rank. buffers: bytes of an update's buffers by rank; engine: is an engine rank on the trainer's device?"""
    process = GUESSES["context"] + (GUESSES["nccl"] if trainer.placement.world_size > 1 else 0)
    return [
        _peaks(_trained(shapes, trainer, rank, job), job, buffers[rank], engine, process) for rank in _ranks(trainer)
    ]


def _ranks(trainer: Trainer) -> range:
    return range(trainer.placement.world_size)


def _peaks(found: Trained, job: Job, buffers: int, engine: bool, process: int) -> Peaks:
    holds = {
        "build": found.standing - found.adam,
        "train": found.standing + found.passing,
        "sync": found.standing + buffers,
        "rollout": found.standing,
    }
    share = int(job.mem_fraction * job.device_bytes) if engine else 0
    kept = (process + GUESSES["graphs"]) if engine else 0
    moving = found.passing - found.kept
    held = {phase: size + KEPT[phase] * moving for phase, size in holds.items()}
    if found.kept:
        held["train"] = max(held["train"] - found.kept, (1 + KEPT_WHOLE) * holds["train"])
    device = {
        phase: int(size) + process + kept + (0 if job.releases and phase in ("build", "train") else share)
        for phase, size in held.items()
    }
    return Peaks(found, holds, device)


def _trained(shapes: Shapes, trainer: Trainer, rank: int, job: Job) -> Trained:
    placement, place = trainer.placement, trainer.placement.of(rank)
    elements: defaultdict[str, int] = defaultdict(int)
    columns: dict[str, int] = {}
    names: dict[str, str] = {}
    for shard in trainer.of(rank):
        param = shard.place.tensor
        elements[param] += shard.box.rows * shard.box.cols
        columns[param], names[param] = shard.box.cols, shard.name
    dense = experts = 0
    for param, name in names.items():
        if is_adapted(name):
            of_expert = ".experts." in name
            size = _adapter(name, elements[param], columns[param], job.lora_rank, 1 if of_expert else placement.tp)
            dense, experts = (dense, experts + size) if of_expert else (dense + size, experts)
    replicas = placement.world_size // (placement.tp * placement.pp)
    expert_replicas = placement.world_size // (placement.ep * placement.pp)
    mine = -(-dense // replicas) + -(-experts // expert_replicas)
    tokens = job.micro_batch * job.sequence // placement.cp
    vocabulary = shapes["model.embed_tokens.weight"][0] // placement.tp
    last = place.pp == placement.pp - 1
    inputs, kept, layer = _activations(shapes, placement, place.pp, tokens, job)
    copies = LOGIT_COPIES + (job.micro_batch > 1)
    return Trained(
        weights=(sum(elements.values()) + _tied_copy(shapes, placement, place.pp)) * job.itemsize,
        adapters=(dense + experts) * job.itemsize,
        gradients=(dense + experts) * GRADIENT_BYTES,
        main=mine * MAIN_BYTES,
        adam=mine * ADAM_BYTES,
        inputs=inputs,
        kept=kept,
        layer=LAYER_PASSES * layer,
        logits=tokens * vocabulary * job.itemsize * copies if last else 0,
    )


def _tied_copy(shapes: Shapes, placement: Placement, stage: int) -> int:
    """Elements of the copy of a tied embedding that Megatron allocates as the head where the last pipeline stage is not
    also the first. `Trainer` does not list it, since an update takes these elements from the first stage."""
    if "lm_head.weight" in shapes or placement.pp == 1 or stage < placement.pp - 1:
        return 0
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return vocabulary // placement.tp * hidden


def _adapter(name: str, elements: int, columns: int, lora_rank: int, tp: int) -> int:
    """Parameters of A and B beside a shard of a weight: B is split by rows, A by its rank or, beside a weight that is
    split by columns, by columns (`weights/merge.py`)."""
    rows = elements // columns
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return lora_rank * columns + rows // tp * lora_rank
    return lora_rank // tp * columns + rows * lora_rank


def _activations(shapes: Shapes, placement: Placement, stage: int, tokens: int, job: Job) -> tuple[int, int, int]:
    """Inputs of the recomputed layers, what the others keep, and all tensors of one that is computed again."""
    hidden = shapes["model.embed_tokens.weight"][1]
    numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    layers = len(numbers) // placement.pp
    recomputed = layers if job.recomputed is None else min(job.recomputed, layers)
    in_flight = placement.pp - stage  # one forward, one backward: the first stage is ahead by all of them
    # The last layer has experts where any has: some models begin with dense ones.
    last = f"model.layers.{max(numbers)}."
    matrices = {name: shape for name, shape in shapes.items() if name.startswith(last) and len(shape) == 2}
    attention = sum(rows for name, (rows, _) in matrices.items() if ".self_attn." in name)
    # Each weight's input and output, and what its adapter adds to the output; for all experts of a token.
    widths = {name: 2 * rows + columns for name, (rows, columns) in matrices.items() if name.endswith("_proj.weight")}
    routed = sum(width for name, width in widths.items() if ".mlp.experts.0." in name)
    others = sum(width for name, width in widths.items() if ".mlp." in name and ".mlp.experts." not in name)
    wide = others + routed * job.experts_per_token
    layer = tokens * (2 * attention + 4 * hidden + wide) * job.itemsize // (1 if routed else placement.tp)
    each = tokens * job.itemsize * in_flight
    inputs = recomputed * hidden * each // placement.tp
    return inputs, (layers - recomputed) * _kept(matrices, hidden, job) * each // placement.tp, layer


def _kept(matrices: Shapes, hidden: int, job: Job) -> int:
    """Elements that a layer keeps of a token for its backward pass, experts' tokens evenly spread.

    By what autograd must have: inputs and outputs of both norms; queries, keys and values before and after norm and
    rotation; the output of attention; of each chosen expert its input, gate and up, their product, and its output,
    which is weighed; what each A makes. For Qwen3-30B-A3B 150 KB; 153 were measured (recompute_h200_2.json).
    """
    routed = any(".mlp.experts." in name for name in matrices)
    chosen = job.experts_per_token if routed else 1
    total = 4 * hidden + (2 * hidden * chosen if routed else 0) + job.lora_rank * (2 + 2 * chosen)
    for name, (rows, columns) in matrices.items():
        if ".self_attn." in name:
            total += columns if name.endswith("o_proj.weight") else 2 * rows
        elif ".mlp.experts." not in name or ".mlp.experts.0." in name:
            inner = {"gate_proj": rows, "up_proj": rows, "down_proj": columns}.get(name.split(".")[-2], 0)
            total += inner * (chosen if ".experts." in name else 1)
    return total


def as_json(found: list[Peaks], job: Job) -> dict[str, object]:
    """Bytes by rank, with what they were computed from."""
    ranks = [{"trainer": dict(one.trainer), "device": dict(one.device), "parts": asdict(one.trained)} for one in found]
    return {"job": asdict(job), "guesses": GUESSES, "kept": KEPT, "ranks": ranks}


def as_text(found: list[Peaks], job: Job) -> list[str]:
    """Lines for people: the fullest rank of each phase."""
    lines = [
        f"micro-batches of {job.micro_batch} x {job.sequence:,} tokens, LoRA {job.lora_rank}, engine "
        f"{job.mem_fraction:g} of {job.device_bytes / GB:.0f} GB{', given back while training' if job.releases else ''}"
        f", {'all' if job.recomputed is None else job.recomputed} layers recomputed"
    ]
    lines.append(f"{'phase':8} {'trainer GB':>11} {'device GB':>10}")
    for phase in found[0].device:
        fullest = max(found, key=lambda one: one.device[phase])
        lines.append(f"{phase:8} {fullest.trainer[phase] / GB:11.1f} {fullest.device[phase] / GB:10.1f}")
    parts = asdict(max(found, key=lambda one: one.trainer["train"]).trained)
    lines.append("trainer = " + " + ".join(f"{name} {size / GB:.1f}" for name, size in parts.items()))
    guesses = ", ".join(f"{name} {size / GB:.0f}" for name, size in GUESSES.items())
    lines.append(f"guesses: a recomputed layer; {guesses} GB (of trainer and of engine; nccl of several ranks)")
    return lines
