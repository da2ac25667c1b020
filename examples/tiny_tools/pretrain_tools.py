"""Train the tool task's base model on noisy conversations, in plain transformers on a CPU, one thread.

    OMP_NUM_THREADS=1 python examples/tiny_tools/pretrain_tools.py --output examples/tiny_tools/model

Model, tokenizer and file format are those of examples/tiny_fim; the corpus is `questions.conversation`. The base knows
how to call the calculator and how to read its result, both as minority habits; it can compute nothing by itself. What
the tool says is in its context, and has next to no weight in its loss.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_fim"))

import pretrain
import tokenizer as tiny_tokenizer
import torch
import torch.nn.functional as F
from questions import corpus
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

UNSAID_WEIGHT = 0.1  # loss weight of a token that the model does not say


def tokens(text: PreTrainedTokenizerFast, prompt: str, said: list[tuple[bool, str]]) -> tuple[list[int], list[float]]:
    """Token ids of a conversation as the agent loop builds them, and their weights in the loss."""
    ids = text.encode(prompt, add_special_tokens=False)
    weights = [UNSAID_WEIGHT] * len(ids)
    for own, words in said:
        more = text.encode(words, add_special_tokens=False) + ([text.eos_token_id] if own else [])
        ids += more
        weights += [1.0 if own else UNSAID_WEIGHT] * len(more)
    return ids, weights


def train(model: Qwen3MoeForCausalLM, text: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    talks = corpus(args.seed + 1)
    started = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = pretrain.learning_rate(step, args.steps, args.lr)
        batch = [tokens(text, question.text, said) for question, said in itertools.islice(talks, args.batch_size)]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [text.pad_token_id] * (width - len(ids)) for ids, _ in batch])
        weights = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in batch])[:, 1:].flatten()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # causal: padding on the right changes nothing
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.3f} seconds {time.monotonic() - started:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tool task's base model on noisy conversations.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    rng, talks = random.Random(args.seed), corpus(args.seed)
    drawn = [question.text + "".join(words for _, words in said) for question, said in itertools.islice(talks, 4000)]
    rng.shuffle(drawn)
    text = tiny_tokenizer.train_on(drawn)
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM(pretrain.model_config(text.eos_token_id, text.pad_token_id))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(text)} tokens", flush=True)
    train(model, text, args)
    pretrain.save(model, text, args.output)


if __name__ == "__main__":
    main()
