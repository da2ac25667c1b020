"""Reading data sets: three schemas, errors that name file and line, and an order that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sglang.config_load import split_argv
from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.prompts.source import Keys, PromptSource, load_prompts, load_tokenizer
from megatron_sglang.training.run import _prompts
from megatron_sglang.types import Prompt

MODEL = Path(__file__).parents[2] / "examples" / "tiny_fim" / "model"
FIM = {
    "id": "p",
    "data_source": "fim_python",
    "prefix": "def f(a):\n    return ",
    "suffix": "\n",
    "middle": "a",
    "entry_point": "f",
    "tests": [{"args": [1], "expect": 1}],
}
VERL = {
    "data_source": "math",
    "prompt": "a plus 2",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def load(tokenizer, tmp_path):
    def write_and_load(*rows, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return load_prompts(path, tokenizer, **{"max_prompt_tokens": 64, **options})

    return write_and_load


def test_fim_row_becomes_a_psm_prompt_and_keeps_its_problem(load, tokenizer):
    (prompt,) = load(FIM).prompts
    assert prompt.problem == FIM
    assert tokenizer.decode(prompt.token_ids_T) == "<|fim_prefix|>def f(a):\n    return <|fim_suffix|>\n<|fim_middle|>"


def test_verl_row_gives_its_verifier_ground_truth_and_extra_info(load, tokenizer):
    (prompt,) = load(VERL).prompts
    assert prompt.data_source == "math"
    assert tokenizer.decode(prompt.token_ids_T) == "a plus 2"
    assert prompt.problem == {
        "id": "data.jsonl:1",
        "data_source": "math",
        "ability": "math",
        "index": 7,
        "ground_truth": "3",
    }


def test_slime_row_is_read_under_the_configured_keys(load):
    row = {"question": "a", "answer": "3", "about": {"level": 2}}
    (prompt,) = load(row, keys=Keys("question", "answer", "about", "math")).prompts
    assert prompt.problem == {"id": "data.jsonl:1", "data_source": "math", "level": 2, "ground_truth": "3"}


def test_a_named_verifier_needs_no_column_that_names_one(tokenizer, tmp_path):
    """Data sets in slime's schema have a prompt and a label, no more."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "label": "3"}\n')
    words = ["model.hf_path=m", f"data.train={path}", "data.max_prompt_tokens=64", "reward.name=function:m.f"]
    (prompt,) = _prompts(split_argv(words, local_world_size=1).config, str(path), tokenizer)
    assert prompt.problem == {"id": "data.jsonl:1", "data_source": "function:m.f", "ground_truth": "3"}
    with pytest.raises(DataError, match=r"no data_source.*or name one for all in reward\.name"):
        _prompts(split_argv(words[:-1], local_world_size=1).config, str(path), tokenizer)


def test_a_null_is_no_value(load, tokenizer, tmp_path):
    """Ids would all be None; and parquet has a null where another row has an optional field."""
    ids = [prompt.id for prompt in load({**VERL, "id": None}, {**VERL, "id": None}).prompts]
    assert ids == ["data.jsonl:1", "data.jsonl:2"]
    rows = [{**FIM, "family": "x", "pure": True}, {**FIM, "id": "q"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert load_prompts(tmp_path / "data.parquet", tokenizer, max_prompt_tokens=64).prompts[1].problem == rows[1]
    nested = {**VERL, "data_source": "fim_python", "extra_info": {**FIM, "preamble": None}}
    assert "preamble" not in load(nested).prompts[0].problem


def test_parquet_gives_the_same_prompts_as_jsonl(load, tokenizer, tmp_path):
    rows = [{**VERL, "id": str(number)} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert load_prompts(tmp_path / "data.parquet", tokenizer, max_prompt_tokens=64) == load(*rows)


def test_chat_messages_go_through_the_chat_template(load, tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (prompt,) = load({**VERL, "prompt": [{"role": "user", "content": "sum"}]}).prompts
    assert tokenizer.decode(prompt.token_ids_T) == "user:sum\na:"


def test_a_null_of_parquet_is_no_field_of_a_message(load, tokenizer, monkeypatch, tmp_path):
    """The templates of Llama and others take any message that has the field for a call."""
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}calls {{ m.tool_calls[0].keys() | join(' ') }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    calls = [{"role": "assistant", "tool_calls": [{"name": "a"}]}, {"role": "tool", "tool_calls": [{"of": "b"}]}]
    rows = [{**VERL, "id": str(place), "prompt": [turn]} for place, turn in enumerate(calls)]
    rows.append({**VERL, "id": "2", "prompt": [{"role": "user", "content": "sum"}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    found = load_prompts(tmp_path / "data.parquet", tokenizer, max_prompt_tokens=64)
    assert [tokenizer.decode(one.token_ids_T) for one in found.prompts] == ["calls name", "calls of", "sum"]
    assert found == load(*rows)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].role + messages[0].content }}", "can only concatenate str"),
    ],
)
def test_messages_that_the_chat_template_refuses_are_reported(load, tokenizer, monkeypatch, template, message):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=rf"data\.jsonl:1: the tokenizer's chat template does not take.*{message}"):
        load({**VERL, "prompt": [{"role": "system", "content": None}]})


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "a JSON list; expected one JSON object"),
        ("\udc80", "not JSON"),
        (without(FIM, "tests", "middle"), "problem lacks middle, tests; expected the fields id"),
        ({**FIM, "tests": []}, "tests is empty"),
        ({**FIM, "tests": [{"args": 1, "expect": 1}]}, r"tests\[0\] is"),
        ({**FIM, "tests": ["assert True"]}, r"tests\[0\] is 'assert True'.*candidate"),
        ({**FIM, "pure": "yes"}, "field pure is of type str; expected bool"),
        (FIM, "id 'p' is already that of .*data.jsonl:1"),
        ({"text": "a"}, "row lacks 'prompt', it has text"),
        ({"prompt": "a"}, "no data_source"),
        (without(VERL, "data_source"), "no data_source"),
        ({**VERL, "reward_model": {}}, "reward_model has no ground_truth"),
        ({**VERL, "extra_info": 3}, "field extra_info is of type int; expected an object"),
        ({**VERL, "prompt": 3}, "expected text or a list of chat messages"),
        ({**VERL, "prompt": ""}, "prompt is empty"),
        ({**VERL, "prompt": []}, "expected text or a list of chat messages"),
        ({**VERL, "prompt": "a \ud83d"}, r"has '\\ud83d', half a surrogate pair"),
        ({**VERL, "prompt": [{"role": "user", "content": "a \ud83d"}]}, "half a surrogate pair"),
        ({**FIM, "prefix": "a \ud83d"}, "half a surrogate pair"),
        ({**VERL, "prompt": [{"role": "user", "content": "a"}]}, "tokenizer with a chat template"),
        ({**VERL, "data_source": "fim_python"}, "problem lacks prefix"),
        (
            {**FIM, "id": "long", "prefix": "a" * 99},
            r"prompt 'long' has \d+ tokens; at most 64 fit; .*data.max_prompt_tokens.*data.overlong=skip",
        ),
    ],
)
def test_bad_row_is_reported_with_file_and_line(load, tmp_path, row, message):
    """The good row in line 1 and the blank line 2 must not shift the number."""
    path = tmp_path / "data.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_bytes((json.dumps(FIM) + "\n\n" + text + "\n").encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        load_prompts(path, load_tokenizer(MODEL), max_prompt_tokens=64)


def test_long_prompts_can_be_skipped_and_are_counted(load):
    loaded = load(FIM, {**FIM, "id": "long", "prefix": "a" * 99}, too_long="skip")
    assert [prompt.id for prompt in loaded.prompts] == ["p"]
    assert loaded.skipped == 1


@pytest.mark.parametrize(
    ("name", "message"), [("no.jsonl", "not a file"), ("data.csv", "'.csv'"), ("bad.parquet", "parquet")]
)
def test_unreadable_file_is_named(tokenizer, tmp_path, name, message):
    for present in ("data.csv", "bad.parquet"):
        (tmp_path / present).write_text("a,b\n")
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_prompts(tmp_path / name, tokenizer, max_prompt_tokens=64)


def test_empty_file_is_an_error(load):
    with pytest.raises(DataError, match=r"data\.jsonl: no prompt was read"):
        load("")


def test_folder_without_tokenizer_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


PROMPTS = tuple(Prompt(str(number), (number,), "x") for number in range(10))


def ids(source: PromptSource, batches: int) -> list[list[str]]:
    return [[prompt.id for prompt in source.draw(source.prompts_per_batch)] for _ in range(batches)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 7])
def test_resumed_source_continues_as_if_never_interrupted(shuffle, drawn):
    whole = PromptSource(PROMPTS, 4, seed=3, shuffle=shuffle)
    ids(whole, drawn)
    state = json.loads(json.dumps(whole.state()))
    resumed = PromptSource(PROMPTS, 4, seed=3, shuffle=shuffle)
    resumed.restore(state)
    assert ids(resumed, 9) == ids(whole, 9)


def test_epochs_are_permutations_in_new_orders():
    source = PromptSource(PROMPTS, 5, seed=0)
    first, second = ([name for batch in ids(source, 2) for name in batch] for _ in range(2))
    assert sorted(first) == sorted(second) == [prompt.id for prompt in PROMPTS]
    assert first != second


def test_batch_never_holds_a_prompt_twice():
    """Groups are told apart by prompt id, so the rest of an epoch must not meet the next one in a batch."""
    assert all(len(set(batch)) == 4 for batch in ids(PromptSource(PROMPTS, 4, seed=1), 50))


def test_unshuffled_order_is_that_of_the_file():
    assert ids(PromptSource(PROMPTS, 5, shuffle=False), 2) == [list("01234"), list("56789")]


def test_seed_decides_the_order():
    assert ids(PromptSource(PROMPTS, 5, seed=1), 4) == ids(PromptSource(PROMPTS, 5, seed=1), 4)
    assert ids(PromptSource(PROMPTS, 5, seed=1), 4) != ids(PromptSource(PROMPTS, 5, seed=2), 4)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (PromptSource(PROMPTS[:9], 4, seed=3), "prompts"),
        (PromptSource(PROMPTS, 4, seed=4), "seed"),
        (PromptSource(PROMPTS, 4, seed=3, shuffle=False), "shuffle"),
    ],
)
def test_state_of_another_data_set_or_order_is_refused(other, name):
    with pytest.raises(DataError, match=f"saved with {name}="):
        other.restore(PromptSource(PROMPTS, 4, seed=3).state())


@pytest.mark.parametrize("size", [0, 11])
def test_impossible_batch_size_is_refused(size):
    with pytest.raises(
        ConfigError, match=f"rollout.prompts_per_batch={size} with 10 prompts in data.train; expected 1 to 10"
    ):
        PromptSource(PROMPTS, size)
