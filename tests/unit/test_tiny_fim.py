"""The committed tiny task: data, tokenizer and base model belong together and are what their scripts make."""

from __future__ import annotations

import ast
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_sglang.prompts.fim import FimTokens, complete
from megatron_sglang.prompts.schema import check_problem
from megatron_sglang.prompts.source import load_prompts, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_fim"
sys.path.insert(0, str(TINY))

import problems  # noqa: E402
import tokenizer as tiny_tokenizer  # noqa: E402

SPLITS = tuple(problems.COUNTS)


def read(split: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made() -> dict[str, list[tuple[problems.Draft, dict]]]:
    return {split: problems.make(split, count, seed=1) for split, count in problems.COUNTS.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY / "model")


@pytest.mark.parametrize("split", SPLITS)
def test_committed_files_are_what_the_generator_writes(split, made):
    assert read(split) == [record for _, record in made[split]]
    assert (TINY / f"{split}.jsonl").stat().st_size < 700_000


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_obeys_the_schema_and_parses(split):
    for problem in read(split):
        check_problem(problem, problem["id"])
        ast.parse(complete(problem, problem["middle"]))


def test_splits_share_no_problem(made):
    """Guards the held-out pass rate against problems seen in training, whatever the function is called."""
    keys = {split: {draft.key for draft, _ in made[split]} for split in SPLITS}
    texts = {split: {record["prefix"] + record["suffix"] for _, record in made[split]} for split in SPLITS}
    assert [len(keys[split]) for split in SPLITS] == list(problems.COUNTS.values())
    assert not keys["train"] & keys["heldout"]
    assert not texts["train"] & texts["heldout"]


def test_pretraining_corpus_has_no_heldout_problem(made):
    heldout = {draft.key for draft, _ in made["heldout"]}
    corpus = problems.corpus(seed=2)
    assert not heldout & {next(corpus).key for _ in range(20_000)}


@pytest.mark.parametrize("split", SPLITS)
def test_families_are_balanced_in_every_stretch(split):
    """A batch of 9 or more prompts must not consist of one family by bad luck."""
    families = [problem["family"] for problem in read(split)]
    assert set(Counter(families).values()) == {problems.COUNTS[split] // 9}
    assert all(len(set(families[start : start + 9])) == 9 for start in range(0, len(families), 9))


def passed(draft: problems.Draft, middle: str, tests: list[dict]) -> list[bool]:
    outcomes = problems._outcomes(draft, middle, [test["args"] for test in tests])
    wanted = [(type(test["expect"]), test["expect"]) for test in tests]
    return [outcome == want for outcome, want in zip(outcomes, wanted, strict=True)]


@pytest.mark.parametrize("split", SPLITS)
def test_right_answer_passes_and_systematic_bug_never_does(split, made):
    """Were the bug to pass, RL would be rewarded for the habit it has to unlearn."""
    for draft, record in made[split]:
        assert all(passed(draft, draft.meaning.gold, record["tests"])), record["id"]
        assert not all(passed(draft, draft.meaning.bug, record["tests"])), record["id"]


def test_other_wrong_answers_hardly_ever_pass(made):
    results = [
        all(passed(draft, wrong, record["tests"]))
        for draft, record in made["heldout"]
        for wrong in draft.meaning.others
    ]
    assert sum(results) / len(results) < 0.01


def test_noisy_corpus_has_the_shares_it_says():
    rng, corpus = random.Random(0), problems.corpus(seed=3)
    drafts = [next(corpus) for _ in range(4000)]
    middles = [(draft, draft.noisy_middle(rng, 0.25, 0.45)) for draft in drafts]
    gold = sum(middle == draft.meaning.gold for draft, middle in middles) / len(middles)
    bug = sum(middle == draft.meaning.bug for draft, middle in middles) / len(middles)
    assert gold == pytest.approx(0.25, abs=0.03)
    assert bug == pytest.approx(0.45, abs=0.03)


def test_tokenizer_is_reproducible_and_survives_saving(tokenizer):
    """AutoTokenizer picks a class by model type; it must split exactly as the trained one does."""
    fresh = tiny_tokenizer.train(seed=1)
    assert fresh.get_vocab() == tokenizer.get_vocab()
    for problem in read("heldout"):
        source = complete(problem, problem["middle"])
        token_ids = tokenizer.encode(source, add_special_tokens=False)
        assert token_ids == fresh.encode(source, add_special_tokens=False)
        assert tokenizer.decode(token_ids) == source


def test_special_tokens_fit_model_and_generation(tokenizer):
    """An end token that generation does not know would make every answer run into the length limit."""
    config = json.loads((TINY / "model" / "config.json").read_text())
    generation = json.loads((TINY / "model" / "generation_config.json").read_text())
    fim = FimTokens.of(tokenizer)
    assert tokenizer.eos_token_id == config["eos_token_id"] == generation["eos_token_id"] == 0
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, fim.prefix, fim.suffix, fim.middle}) == 5
    assert len(tokenizer) <= config["vocab_size"]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_and_answers_fit_the_budget(split, tokenizer):
    """The recipe generates 24 tokens; a right answer that is longer could never score."""
    loaded = load_prompts(TINY / f"{split}.jsonl", tokenizer, max_prompt_tokens=72)
    assert len(loaded.prompts) == problems.COUNTS[split]
    assert max(len(tokenizer.encode(prompt.problem["middle"])) + 1 for prompt in loaded.prompts) <= 24


def test_checkpoint_has_hub_names_and_small_size():
    """SGLang and Megatron-Bridge read per-expert names; transformers 5 holds fused experts in memory."""
    file = TINY / "model" / "model.safetensors"
    assert file.stat().st_size < 4_000_000
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    expert = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    wanted = {expert.format(a, b, c) for a in range(4) for b in range(8) for c in ("gate", "up", "down")}
    assert wanted <= names
    assert not any("gate_up" in name or "lm_head" in name for name in names)
    assert dtypes == {"BF16"}
    assert json.loads((TINY / "model" / "config.json").read_text())["dtype"] == "float32"
