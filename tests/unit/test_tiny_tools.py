"""The committed tool task: data, tokenizer and base model belong together and are what their scripts make."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_sglang.agents import plain_encoder
from megatron_sglang.agents.environment import Environments, Services
from megatron_sglang.agents.tools import calculate
from megatron_sglang.prompts.source import load_prompts, load_tokenizer
from megatron_sglang.types import Completion, Prompt

ROOT = Path(__file__).parents[2] / "examples"
TOOLS = ROOT / "tiny_tools"
sys.path.insert(0, str(TOOLS))

import questions  # noqa: E402


@pytest.mark.parametrize("split", questions.COUNTS)
def test_committed_questions_are_what_the_generator_writes_and_their_labels_are_right(split):
    found = [json.loads(line) for line in (TOOLS / f"{split}.jsonl").read_text().splitlines()]
    assert found == questions.records(split, questions.COUNTS[split], seed=1)
    assert all(calculate(record["label"]) == record["label"] for record in found)
    families = Counter(record["metadata"]["family"] for record in found)
    assert set(families.values()) == {len(found) // len(questions.FAMILIES)}


def test_no_held_out_pair_of_numbers_is_asked_in_training():
    """Guards the held-out pass rate against answers learned by heart."""
    rng = random.Random(0)
    held_out = {questions.draw("heldout", rng, "add").numbers[:2] for _ in range(3000)}
    trained = {question.numbers[:2] for question, _ in itertools.islice(questions.corpus(2), 20_000)}
    assert not held_out & trained


def test_the_systematic_bug_is_always_wrong_and_the_noise_has_the_shares_it_says():
    """Were the bug right now and then, or right calls the majority, there would be nothing for RL to find out."""
    talks = list(itertools.islice(questions.corpus(3), 6000))
    assert all(calculate(question.bug) != question.answer for question, _ in talks)
    first = Counter("right" if said[0][1] == f"calc({question.expression})" else "other" for question, said in talks)
    assert first["right"] / len(talks) == pytest.approx(questions.FIRST["right"], abs=0.03)
    solved = sum(said[-1][1] == question.answer for question, said in talks) / len(talks)
    assert 0.1 < solved < 0.2


def test_tokenizer_and_budget_fit_the_recipe():
    tokenizer = load_tokenizer(TOOLS / "model")
    config = json.loads((TOOLS / "model" / "config.json").read_text())
    assert tokenizer.eos_token_id == config["eos_token_id"] == 0
    assert len(tokenizer) <= config["vocab_size"]
    encode = plain_encoder(tokenizer)
    assert 0 not in encode("<|endoftext|>")
    for split, count in questions.COUNTS.items():
        assert len(load_prompts(TOOLS / f"{split}.jsonl", tokenizer, max_prompt_tokens=32).prompts) == count
    for _, said in itertools.islice(questions.corpus(4), 2000):
        lengths = [len(encode(text)) for _, text in said]
        assert max(lengths) <= 23
        assert sum(lengths) + len(said) <= 96


def test_a_call_with_half_a_surrogate_pair_in_it_is_answered():
    """The error says the name of the tool, which the model chose; it would end the run."""
    encode = plain_encoder(load_tokenizer(TOOLS / "model"))
    services = Services(score=None, encode=encode)  # type: ignore[arg-type]  # it asks no verifier
    environment = Environments.of({"name": "arithmetic", "calls": "json"}).make(services)
    environment.reset(Prompt("q", (1,), "arithmetic", {"ground_truth": "1"}))
    call = r'<tool_call>{"name": "\ud800", "arguments": {"expression": "1"}}</tool_call>'
    step = asyncio.run(environment.step(Completion((1,), (0.0,), "stop", 1, text=call)))
    assert encode(step.observation) == encode("error: no tool \\ud800\n")


def test_checkpoint_is_small_and_of_the_other_example_s_shape():
    sizes = {}
    for folder in (TOOLS, ROOT / "tiny_fim"):
        file = folder / "model" / "model.safetensors"
        assert file.stat().st_size < 2_200_000
        with safe_open(file, "pt") as weights:
            sizes[folder.name] = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    assert sizes["tiny_tools"] == sizes["tiny_fim"]
