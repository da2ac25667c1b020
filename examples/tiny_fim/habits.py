"""Which habit a model follows on the tiny task's held-out problems, told by the text of its answers; nothing is run.

    python examples/tiny_fim/habits.py --model examples/tiny_fim/model --samples 4

gold: the right answer as the template writes it. bug: the operation's systematic bug. other: another wrong answer of
the noisy corpus. none: anything else, such as a name copied wrong or no end within the limit.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from pathlib import Path

import torch
from problems import COUNTS, Draft, make
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from megatron_sglang.prompts.fim import FimTokens
from megatron_sglang.prompts.source import load_tokenizer

HABITS = ("gold", "bug", "other", "none")
BATCH = 64


@torch.no_grad()
def habits(
    model: Qwen3MoeForCausalLM, text: PreTrainedTokenizerFast, *, samples: int = 1, greedy: bool = False, seed: int = 0
) -> dict[str, Counter[str]]:
    """Counts of each habit by family, `samples` answers a problem at temperature 1 (or the most likely answer)."""
    torch.manual_seed(seed)
    fim = FimTokens.of(text)
    found: dict[str, Counter[str]] = {}
    drafts = [draft for draft, _ in make("heldout", COUNTS["heldout"], seed=1)] * samples
    for chunk in itertools.batched(drafts, BATCH):
        prompts = [fim.prompt(draft.prefix, draft.after) for draft in chunk]
        width = max(map(len, prompts))
        ids = torch.tensor([[text.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        output = model.generate(input_ids=ids, attention_mask=(ids != text.pad_token_id).long(), do_sample=not greedy)
        for draft, answer in zip(chunk, output[:, width:].tolist(), strict=True):
            found.setdefault(draft.family, Counter())[_habit(draft, text, answer)] += 1
    return found


def _habit(draft: Draft, text: PreTrainedTokenizerFast, answer: list[int]) -> str:
    if text.eos_token_id not in answer:
        return "none"
    middle = text.decode(answer[: answer.index(text.eos_token_id)])
    known = dict.fromkeys(draft.meaning.others, "other") | {draft.meaning.bug: "bug", draft.meaning.gold: "gold"}
    return known.get(middle, "none")


def table(found: dict[str, Counter[str]]) -> str:
    """Shares in percent, a line per family and one for all."""
    rows = {**dict(sorted(found.items())), "all": sum(found.values(), Counter())}
    lines = ["family  " + "".join(f"{habit:>7}" for habit in HABITS)]
    for family, counts in rows.items():
        lines.append(f"{family:<8}" + "".join(f"{100 * counts[habit] / counts.total():7.1f}" for habit in HABITS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify a model's answers to the held-out problems by their text.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1, help="answers a problem")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = Qwen3MoeForCausalLM.from_pretrained(args.model, dtype=torch.float32, experts_implementation="eager").eval()
    text = load_tokenizer(args.model)
    print(table(habits(model, text, samples=args.samples, greedy=args.greedy, seed=args.seed)))


if __name__ == "__main__":
    main()
