"""Train the tiny task's base model on a noisy corpus, in plain transformers on a CPU (6-12 minutes, one thread).

    OMP_NUM_THREADS=1 python examples/tiny_fim/pretrain.py --output examples/tiny_fim/model

Of the answers in the corpus 25 % are right, 45 % are the operation's systematic bug, 30 % another wrong answer, so the
base knows the right answer as a minority habit; unit tests can tell RL which habit to keep. The folder is a complete
Hugging Face checkpoint (Qwen3-MoE, tensor names as on the hub, tokenizer). Weights are stored rounded to bf16 to keep
the file small; run them in float32, into which bf16 converts exactly.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import tokenizer as tiny_tokenizer
import torch
import torch.nn.functional as F
from habits import habits, table
from problems import corpus
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_sglang.prompts.fim import FimTokens

WARMUP_STEPS = 50
PROMPT_WEIGHT = 0.1  # loss weight of a prompt token; an answer's token weighs 1
MAX_NEW_TOKENS = 24

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its answer with the end token."""


def model_config(end: int, pad: int) -> Qwen3MoeConfig:
    """About a million parameters; sizes chosen so that TP 2, EP 2 and PP 2 divide them."""
    return Qwen3MoeConfig(
        vocab_size=tiny_tokenizer.VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=256,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        router_aux_loss_coef=0.0,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        experts_implementation="eager",  # the batched kernels are 10 to 70 times slower on a CPU
        dtype="float32",
    )


def pad_right(pairs: list[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and attention mask, [batch, length] int64, and the weight of each token in the loss, float32."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, mask, weights = [], [], []
    for prompt, answer in pairs:
        gap = length - len(prompt) - len(answer)
        ids.append(prompt + answer + [pad] * gap)
        mask.append([1] * (length - gap) + [0] * gap)
        weights.append([PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer) + [0.0] * gap)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(weights)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant to half, then linear down to 2 %."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, min(1.0, 2 * (1 - step / steps)))


def pretrain(
    model: Qwen3MoeForCausalLM, next_pairs: Callable[[], list[Pair]], pad: int, steps: int, peak: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, mask, weights = pad_right(next_pairs(), pad)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.3f} seconds {time.monotonic() - started:.0f}", flush=True)


def save(model: Qwen3MoeForCausalLM, text: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint; `model` is left rounded to bf16, still in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)  # splits the fused experts into the hub's names
    model.to(torch.float32)
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    text.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny task's base model on the noisy corpus.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gold", type=float, default=0.25, help="share of right answers in the corpus")
    parser.add_argument("--bug", type=float, default=0.45, help="share of systematic bugs in the corpus")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    text = tiny_tokenizer.train(args.seed)
    fim = FimTokens.of(text)
    torch.manual_seed(args.seed)
    config = model_config(text.eos_token_id, text.pad_token_id)
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(text)} tokens", flush=True)
    rng, drafts = random.Random(args.seed), corpus(args.seed + 1)

    def next_pairs() -> list[Pair]:
        batch = itertools.islice(drafts, args.batch_size)
        return [
            (
                list(fim.prompt(draft.prefix, draft.after)),
                [*fim.encode(draft.noisy_middle(rng, args.gold, args.bug)), text.eos_token_id],
            )
            for draft in batch
        ]

    pretrain(model, next_pairs, text.pad_token_id, args.steps, args.lr)
    save(model, text, args.output)
    model.eval()
    print(table(habits(model, text)))


if __name__ == "__main__":
    main()
