"""Reading configurations: what is right arrives, what is wrong is named with a remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_sglang import host
from megatron_sglang.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from megatron_sglang.config_argv import FLAGS
from megatron_sglang.config_check import MEGATRON_RL, field_types, known_options
from megatron_sglang.config_docs import help_text, markdown, options, sections
from megatron_sglang.config_load import Invocation, dump, load_config, split_argv
from megatron_sglang.dry_run import describe
from megatron_sglang.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "conf").glob("*.yaml"))
MINIMAL = ["model.hf_path=m", "data.train=t"]


def parse(*argv: str, ranks: int = 8) -> Invocation:
    return split_argv([*MINIMAL, *argv], local_world_size=ranks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_configs_load_and_hold_only_differences(path: Path) -> None:
    """A stale key in conf/ would otherwise be found by a user; a repeated default would go stale unseen."""
    config = load_config(path)
    default = RunConfig(model=ModelConfig(hf_path=""), data=DataConfig(train=""))
    for section, given in OmegaConf.to_container(OmegaConf.load(path)).items():  # type: ignore[union-attr]
        if section not in ("megatron", "sglang"):
            for name in given if isinstance(given, dict) else ():
                values = [getattr(getattr(tree, section), name) for tree in (config, default)]
                assert values[0] != values[1], f"{path.name} repeats the default of {section}.{name}"
    for named in (config.model.hf_path, config.data.train, config.data.eval):
        assert not named.startswith("examples/") or (ROOT / named).exists(), f"{path.name} names {named}"


def test_later_sources_win(tmp_path: Path) -> None:
    """YAML over defaults, overrides over YAML, flags over overrides, wherever they stand on the command line."""
    yaml = tmp_path / "c.yaml"
    yaml.write_text("lora: {rank: 2, alpha: 2}\nrollout: {top_k: 2}\nmegatron: {lr: 2.0, min-lr: 2.0}\n")
    argv = ["--lora-rank", "4", "--lr", "4", "lora.rank=3", "lora.alpha=3", "megatron.min_lr=3", "--config", str(yaml)]
    config = parse(*argv).config
    assert (config.lora.rank, config.lora.alpha, config.rollout.top_k) == (4, 3.0, 2)
    assert config.lora.targets == LoraConfig().targets
    assert (config.megatron["lr"], config.megatron["min-lr"]) == ("4", 3)


def test_words_go_to_whom_they_are_for() -> None:
    """Values of all kinds: none, one, several, negative, glued with =, lists, words that YAML takes for a bool."""
    invocation = parse(
        "--dry-run", "--rollout-top-k=-1", "--unsafe-local-sandbox", "--use-tis",
        "--target-modules", "linear_qkv,router",
        "--sglang-log-level", "info", "--sglang-disable-radix-cache", "--sglang-mem-fraction-static", "0.5",
        "--rollout.eval_samples", "5", "--data-path", "a", "b", "algo.advantage=rloo",
        "--no-inference-wandb-logging", "--sequence-parallel", "--adam-beta2=0.95", "--loss-scale", "-1",
        "algo.kl_coef=1e-3",
    )  # fmt: skip
    config = invocation.config
    assert invocation.dry_run
    assert (config.rollout.top_k, config.rollout.eval_samples, config.algo.tis) == (-1, 5, "token")
    assert config.lora.targets == ("linear_qkv", "router")
    assert config.reward.sandbox == "unsafe-local"
    assert (config.algo.advantage, config.algo.kl_coef) == ("rloo", 1e-3)
    assert config.sglang == {"log_level": "info", "disable_radix_cache": True, "mem_fraction_static": 0.5}
    assert parse("algo.tis=off").config.algo.tis == "off"
    words = " ".join(invocation.megatron_argv)
    assert "--data-path a b --no-inference-wandb-logging --sequence-parallel --adam-beta2 0.95 --loss-scale -1" in words


def test_megatron_gets_what_follows_from_our_own_options() -> None:
    """Sizes written down twice would drift apart: iterations, batch, length, seed and dtype are derived."""
    invocation = parse(
        "--num-rollout", "3", "--global-batch-size", "16", "--seed", "7", "--rollout-max-prompt-len", "40"
    )
    argv = invocation.megatron_argv
    assert argv[:2] == ["--seed=7", "--bf16"]
    options = dict(zip(argv[2::2], argv[3::2], strict=True))
    assert options["--train-iters"] == "12"
    assert options["--seq-length"] == str(40 + 1024)
    assert options["--expert-tensor-parallel-size"] == "1"
    assert invocation.config.engine.tp_size == 8
    assert "--bf16" not in parse("model.dtype=float32").megatron_argv
    assert parse("megatron.sequence-parallel=false", "megatron.inference_wandb_logging=false").megatron_argv[-1] == (
        "--no-inference-wandb-logging"
    )


def test_a_dry_run_refuses_what_the_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """It showed ranks and engines of a run that then ended at its micro-batches."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"--micro-batch-size=32 times 4 .*--global-batch-size=64; set it to 16 or a"):
        describe(parse("--micro-batch-size=32").config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="change the number of ranks"):
        describe(parse().config)


def test_a_null_leaves_an_argument_of_megatron_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for Megatron's parser: what follows from other options stays, and --dry-run shows it."""
    config = parse("megatron.tensor-model-parallel-size=null", "megatron.global-batch-size=null").config
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    assert "global-batch-size: 64" in describe(config)
    assert host.judge(load_config(None, [*MINIMAL, "megatron.context-parallel-size=null"]), {}) == []


def test_a_budget_of_tokens_takes_the_place_of_the_micro_batch_size() -> None:
    """Megatron would refuse a batch that does not divide by a size that nothing uses."""
    for flag in ("--max-seqlen-per-dp-cp-rank", "--max-tokens-per-gpu"):
        packed = parse("--micro-batch-size=48", flag, "4096").config.megatron
        assert (packed["micro-batch-size"], str(packed["max-seqlen-per-dp-cp-rank"])) == (1, "4096")
    assert parse("--micro-batch-size=4", "--max-seqlen-per-dp-cp-rank=0").config.megatron["micro-batch-size"] == "4"


def test_a_dumped_config_is_the_same_config(tmp_path: Path) -> None:
    """The YAML in a run folder must start the same run again."""
    config = parse("--use-tis", "--lr", "1e-5", "--sglang-log-level=info", "lora.targets=[linear_qkv]").config
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert split_argv(["--config", str(tmp_path / "c.yaml")], local_world_size=8).config == config


def test_the_default_method_has_a_second_name() -> None:
    """What all other methods replace is called merged in the documents that this package follows."""
    assert parse("--weight-sync", "merged").config == parse().config


def test_stop_texts_are_taken_as_they_stand() -> None:
    """A comma or a line end in one is a part of it."""
    assert parse("--rollout-stop", "</a>, b").config.rollout.stop == ("</a>, b",)
    assert parse('rollout.stop=["\\n\\n", "a,b"]').config.rollout.stop == ("\n\n", "a,b")
    assert parse().config.rollout.stop == parse("rollout.stop=[]").config.rollout.stop == ()


TEXTS = ("2026_11_20", "007", "12:30", "1e3", "off", "a # b", "a: b", "", "[x")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_the_text_that_was_given(tmp_path: Path, text: str) -> None:
    """YAML takes each of them for something else: a folder under another name, a model that nobody finds."""
    config = parse(
        f"log.run_dir={text}", "--sglang-served-model-name", text, "--input-key", text, "--rollout-stop", text or "x"
    ).config
    assert (config.log.run_dir, config.sglang["served_model_name"], config.data.columns["prompt"]) == (text, text, text)
    assert config.rollout.stop == (text or "x",)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_what_is_read_of_a_text() -> None:
    """Quotes around it, null, and a list of texts."""
    assert parse("log.run_dir='a b'", "data.eval=null").config.log.run_dir == "a b"
    assert parse("data.eval=null").config.data.eval == ""
    assert parse("rollout.stop=null").config.rollout.stop == ("null",)
    assert parse("rollout.stop=[007, off]").config.rollout.stop == ("007", "off")
    external = ("http://a:1", "http://b:2")
    assert parse("engine.external=http://a:1, http://b:2").config.engine.external == external
    assert parse("engine.external=[http://a:1,http://b:2]").config.engine.external == external


def test_values_of_sglang_keep_their_kind() -> None:
    """Numbers in a list were texts, and JSON that SGLang reads itself was read before."""
    words = ["--sglang-cuda-graph-bs-decode", "1", "2", "4", "--sglang-json-model-override-args", '{"a": 1}']
    texts = ["--sglang-encoder-urls", "http://a:1", "007", "--sglang-log-level", "off", "sglang.log-level-http=off"]
    assert parse(*words, *texts).config.sglang == {
        "cuda_graph_bs_decode": [1, 2, 4],
        "json_model_override_args": '{"a": 1}',
        "encoder_urls": ["http://a:1", "007"],
        "log_level": "off",
        "log_level_http": "off",
    }


WRONG = {
    "a flag": (["--lora-rnak", "4"], "did you mean --lora-rank"),
    "megatron flag": (["--expert-model-paralel-size", "2"], "did you mean --expert-model-parallel-size"),
    "sglang flag": (["--sglang-mem-fraction", "0.5"], "did you mean --sglang-mem-fraction-static"),
    "field": (["rollout.temprature=1"], "did you mean rollout.temperature"),
    "field flag": (["--rollout.temprature", "1"], "did you mean --rollout.temperature"),
    "field far off": (["sync.x=1"], "sync has method, bucket_bytes"),
    "section": (["rolout.top_k=1"], "did you mean rollout"),
    "megatron key": (["megatron.learning=1"], "megatron.learning is not an option of the pinned megatron"),
    "sglang key": (["sglang.mem_fracton=1"], "not an option of the pinned sglang"),
    "short for what is ours": (["sglang.tp=2"], "pinned sglang; did you mean engine.tp_size?"),
    "flag short for what is ours": (["--sglang-tp", "2"], "did you mean --engine.tp_size?"),
    "bare word": (["rollout"], "neither a --flag nor section.field=value"),
    "missing value": (["--lora-rank"], "--lora-rank got 0 values; expected 1"),
    "missing value before a flag": (["--lr", "--bf16"], "--lr got 0 values"),
    "value for a switch": (["--use-tis=3"], "takes no value"),
    "type": (["lora.rank=many"], "lora.rank='many' is a str; expected int"),
    "bool as a number": (["lora.rank=true"], "lora.rank=True is a bool; expected int"),
    "number as a bool": (["data.shuffle=3"], "expected bool"),
    "choice": (["algo.loss=ppo"], "set it to gspo or gspo_token or grpo"),
    "item": (["lora.targets=linear_qkv,q_proj"], "'q_proj' is not allowed"),
    "no targets": (["lora.targets="], "lora.targets is empty"),
    "scalar for a section": (["lora=3"], "neither a --flag nor"),
    "unset": (["model.hf_path="], "model.hf_path is not set"),
    "range": (["--rollout-temperature", "0"], "rollout.temperature=0.0; expected above 0"),
    "nan": (["rollout.temperature=.nan"], "expected above 0"),
    "one sample": (["--n-samples-per-prompt", "1"], "compare the members of a group"),
    "clip": (["--eps-clip", "-0.1"], "algo.clip_low=-0.1"),
    "batch": (["--global-batch-size", "48"], "does not divide the 64 samples"),
    "batch text": (["--global-batch-size", "x"], "expected a whole number"),
    "iterations": (["--train-iters", "7"], "make 30 iterations"),
    "budget": (["--max-seqlen-per-dp-cp-rank", "-1"], "the tokens of a packed micro-batch, or 0 to pad"),
    "length": (["--seq-length", "100"], "set it to 3072 or more"),
    "engine size": (["--rollout-num-gpus-per-engine", "3"], "set --rollout-num-gpus-per-engine to 1 or 2 or 4 or 8"),
    "expert size": (["--sglang-ep-size=3"], "sglang.ep_size=3 does not divide engine.tp_size=8"),
    "SGLang's in our section": (
        ["engine.ep_size=2"],
        "engine.ep_size is not an option; it is SGLang's own: sglang.ep_",
    ),
    "no stop text": (["rollout.stop=['', x]"], "stop text '' cannot end a completion"),
    "a number for a list": (["lora.targets=3"], "lora.targets=3; expected a list"),
    "stop texts with routing replay": (
        ["rollout.stop=x", "--moe-enable-routing-replay"],
        "where SGLang tells the experts; leave one of the two out",
    ),
    "over-sampling of others' batches": (
        ["rollout.over_sampling=1.5", "rollout.environment={name: feed}"],
        "rollout.over_sampling=1.5 has no effect",
    ),
    "dynamic sampling of others' batches": (
        ["--dynamic-sampling", "rollout.environment={name: feed}"],
        "rollout.dynamic_sampling=True has no effect",
    ),
    "reward": (["--rm-type", "fim_pyton"], "is unknown; did you mean fim_python?"),
    "Lean without a project": (["--rm-type", "fim_lean"], "reward.lean_project is empty"),
    "binary, of a function": (["reward.name=function:m.f", "reward.binary=true"], "reward.binary=True has no effect"),
    "sandbox, of a function": (["reward.name=function:m.f", "reward.sandbox=restricted"], "has no effect on"),
    "stop texts of others' batches": (["rollout.stop=x", "rollout.environment={name: feed}"], "to whoever samples"),
    "expert tensor parallel": (["--expert-tensor-parallel-size", "2"], "set it to 1"),
    "adapters of routers over ranks": (
        ["--tensor-model-parallel-size=2", "lora.targets=[linear_qkv,router]"],
        "with router among lora.targets",
    ),
    "tokens for a loss of sequences": (
        ["algo.aggregation=token_mean"],
        "set it to sequence_mean, or algo.loss to grpo",
    ),
    "a cap that cuts equals": (["--tis-clip", "0.5"], "algo.tis_cap=0.5; expected 1 or above"),
    "owned by us": (["--bf16"], "it follows from model.dtype"),
    "owned in sglang": (["sglang.tp_size=2"], "it follows from engine.tp_size"),
    "megatron's own RL": (["--rl-partial-rollouts"], "Megatron's own RL loop, which this package replaces"),
    "switch as text": (["megatron.sequence-parallel=yes please"], "expected true or false"),
    "word as switch": (["megatron.lr-decay-style=on"], "quote words"),
    "evaluation without data": (["rollout.eval_interval=5"], "set --eval-prompt-data"),
    "parallel size as a word": (["--tensor-model-parallel-size", "two"], "'two'; expected a whole number"),
    "parallel size of nothing": (["--pipeline-model-parallel-size=0"], "-parallel-size=0; expected 1 or above"),
    "no file": (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_with_a_remedy(argv: list[str], message: str) -> None:
    """A typo that is ignored, or a traceback from deep inside Megatron half a minute later."""
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- a", "lora: 3", "seed: {a: 1}", "megatron: 3", "a: ${b}"])
def test_broken_yaml_is_a_config_error(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, the user reads one line and not a traceback of the parser."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        parse("--config", str(tmp_path / "c.yaml"))


def test_warnings_name_what_is_probably_not_meant() -> None:
    """GSPO with GRPO's clip range runs, and learns slowly for no visible reason."""
    assert [line.split()[0] for line in parse("--eps-clip", "0.2", "--rollout-top-p", "0.9").warnings] == [
        "algo.clip_low=0.2,",
        "rollout.top_p/top_k",
    ]
    assert parse("--eps-clip", "0.2", "--advantage-estimator", "grpo").warnings == ()
    assert "a sample may have 3072" in parse("--max-tokens-per-gpu", "2048").warnings[0]
    assert parse("--max-tokens-per-gpu", "2048", "--context-parallel-size", "2").warnings == ()
    assert "take k2 or k3" in parse("--kl-loss-coef", "0.01", "--kl-loss-type", "k1").warnings[0]
    assert parse("--kl-loss-type", "k1").warnings == (), "it is only reported"
    fed = parse("--eval-prompt-data", "x.jsonl", "rollout.environment={name: feed}").warnings
    assert [line.split(":")[0] for line in fed] == ["data.eval has no effect"]
    assert "rollout.stragglers=resume has no effect" in parse("--partial-rollout").warnings[0]
    assert parse("--partial-rollout", "--over-sampling", "1.5").warnings == ()


def test_short_flags_do_not_hide_megatrons() -> None:
    """A short flag of a Megatron name takes it away from Megatron: --seed is passed on, its RL loop does not run."""
    shared = FLAGS.keys() & known_options("megatron").keys()
    assert {name for name in shared if not name.startswith(MEGATRON_RL)} == {"seed"}
    targets = {".".join(target.split("=")[0].split(".")[:2]) for target in FLAGS.values()}
    assert targets <= field_types().keys() | {f"megatron.{name}" for name in known_options("megatron")}


def test_option_tables_are_of_the_pinned_versions() -> None:
    """After a change of a pin the tables must be written anew, or right flags are refused."""
    pins = (ROOT / "pyproject.toml").read_text()
    for table, package in (("megatron_flags.txt", "megatron-core"), ("sglang_fields.txt", "sglang")):
        _, name, version, *_ = (ROOT / "megatron_sglang" / table).read_text().replace(":", "").split()
        assert name == package
        assert f'"{package}=={version}"' in pins


def test_every_field_is_documented_and_docs_are_current() -> None:
    """docs/configuration.md is made by `make docs`; an option nobody explained is an option nobody uses."""
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run `make docs`"
    assert all(path in help_text() for path in field_types())
    required = {option.path for section in sections() for option in options(section) if option.default == "required"}
    assert required == {"model.hf_path", "data.train"}


def test_configs_are_immutable() -> None:
    """A stage that changes its options changes another stage's run."""
    config: Any = parse().config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora.rank = 1
