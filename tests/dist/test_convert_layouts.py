"""Checkpoints to Hugging Face folders and back: equal to Megatron's LoRA model, whatever the layouts of both sides."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import HF, LAYOUTS

pytestmark = pytest.mark.dist

TP2 = {"tensor-model-parallel-size": 2}
EP2 = {"expert-model-parallel-size": 2}
PP2 = {"pipeline-model-parallel-size": 2}
LORA = {"rank": 8, "alpha": 16}


def sizes(name: str) -> dict[str, Any]:
    """The converter's part of a layout; it takes care of sequence parallelism by itself."""
    return {flag: size for flag, size in LAYOUTS[name][1].items() if flag != "sequence-parallel"}


def tokens() -> torch.Tensor:
    return torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(5))


def base_model(hf: str | Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()


@torch.no_grad()
def hf_logits(hf: str | Path, adapter: Path | None = None, resave: Path | None = None) -> torch.Tensor:
    """Logits of transformers' model, or of peft's model around it; peft saves its adapter to `resave`."""
    model = base_model(hf)
    if adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
        if resave is not None:
            model.save_pretrained(resave)
    return model(tokens()).logits


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name].to(found[name].dtype))] == []


@pytest.fixture(scope="module")
def saved(run_ranks, tmp_path_factory) -> Path:
    """A folder with the checkpoint `tp2_ep2`, saved in that layout, and Megatron's logits with it."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(4, "cases_convert.save", hf=HF, folder=str(folder / "tp2_ep2"), layout=sizes("tp2_ep2"), lora=LORA)
    arguments = {"hf": HF, "load": str(folder / "tp2_ep2"), "output": str(folder / "logits.pt")}
    run_ranks(1, "cases_convert.logits", layout={}, **arguments)
    return folder


@pytest.fixture(scope="module")
def exported(run_ranks, saved) -> Path:
    """`saved` with the PEFT adapter of the checkpoint, and the same once more as peft saves it again."""
    to = {"hf_model": HF, "load": str(saved / "tp2_ep2"), "output": str(saved / "adapter")}
    run_ranks(1, "cases_convert.convert", calls=[("export_adapter", to)])
    hf_logits(HF, saved / "adapter", resave=saved / "resaved")
    return saved


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_exports_equal_megatrons_model_in_every_layout(run_ranks, saved, tmp_path, name):
    """A conversion with local expert numbers, or a q/k/v or gate/up cut in the wrong place, loads without complaint."""
    given = {"hf_model": HF, "load": str(saved / "tp2_ep2"), "sizes": sizes(name)}
    calls = [
        ("export_merged", given | {"output": str(tmp_path / "merged")}),
        ("export_adapter", given | {"output": str(tmp_path / "adapter")}),
    ]
    for done in run_ranks(LAYOUTS[name][0], "cases_convert.convert", calls=calls):
        assert done == [134, 112]
    megatron = torch.load(saved / "logits.pt")
    assert (hf_logits(HF) - megatron).abs().max() > 0.5
    assert (hf_logits(tmp_path / "merged") - megatron).abs().max() <= 1e-4
    assert (hf_logits(HF, tmp_path / "adapter") - megatron).abs().max() <= 1e-4


def test_a_checkpoint_is_the_same_model_in_another_layout(run_ranks, saved):
    """Loading in the wrong order over TP, EP or PP: the export would be right for a model that nobody trained."""
    other = str(saved / "other.pt")
    layout = sizes("tp2_ep2_pp2")
    run_ranks(4, "cases_convert.logits", hf=HF, load=str(saved / "tp2_ep2"), layout=layout, output=other)
    assert (torch.load(other) - torch.load(saved / "logits.pt")).abs().max() <= 1e-4


def test_without_adapters_the_model_comes_back_bit_for_bit(run_ranks, tmp_path):
    """B = 0 must not cost a bit: Hugging Face -> Megatron -> Hugging Face, and the shards must have a right index."""
    checkpoint, output = str(tmp_path / "checkpoint"), tmp_path / "back"
    calls = [
        ("import_adapter", {"hf_model": HF, "save": checkpoint, "sizes": EP2, "rank": 4}),
        ("export_merged", {"hf_model": HF, "load": checkpoint, "output": str(output), "shard_bytes": 10**6}),
    ]
    assert run_ranks(2, "cases_convert.convert", calls=calls)[0][0][:2] == [4, 32.0]
    where = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    back = {name: load_file(output / file)[name] for name, file in where.items()}
    assert_equal(back, load_file(Path(HF) / "model.safetensors"))
    assert len(set(where.values())) >= 4
    assert (hf_logits(output) == hf_logits(HF)).all()
    assert (output / "tokenizer.json").read_bytes() == (Path(HF) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("given", "layout"), [("adapter", PP2), ("resaved", TP2)])
def test_an_adapter_comes_back_bit_for_bit(run_ranks, exported, tmp_path, given, layout):
    """PEFT -> Megatron -> PEFT, from our layout and from that in which peft itself saves fused experts."""
    checkpoint, output = str(tmp_path / "checkpoint"), str(tmp_path / "back")
    calls = [
        ("import_adapter", {"hf_model": HF, "save": checkpoint, "adapter": str(exported / given), "sizes": layout}),
        ("export_adapter", {"hf_model": HF, "load": checkpoint, "output": output}),
    ]
    done = run_ranks(2, "cases_convert.convert", calls=calls)[0]
    assert done == [[8, 16.0, ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]], 112]
    assert_equal(adapters(tmp_path / "back"), adapters(exported / "adapter"))


def test_an_adapter_that_peft_trained_keeps_its_deltas(run_ranks, exported, tmp_path):
    """peft gives q, k and v, gate and up an A of their own: they need three times the rank, or the reason why not."""
    own = tmp_path / "own"
    shutil.copytree(exported / "adapter", own)
    generator = torch.Generator().manual_seed(3)
    different = {
        name: torch.randn(tensor.shape, generator=generator) / 11 if ".lora_A." in name else tensor
        for name, tensor in adapters(own).items()
        if "k_proj" not in name and ".layers.2." not in name
    }
    save_file(different, own / "adapter_model.safetensors")
    given = {"hf_model": HF, "adapter": str(own)}
    calls = [
        ("import_adapter", given | {"save": str(tmp_path / "small"), "rank": 8}),
        ("import_adapter", given | {"save": str(tmp_path / "checkpoint")}),
        ("export_merged", {"hf_model": HF, "load": str(tmp_path / "checkpoint"), "output": str(tmp_path / "merged")}),
    ]
    refused, taken, _ = run_ranks(1, "cases_convert.convert", calls=calls)[0]
    assert "--lora-rank 8 is below 16" in refused
    assert taken[:2] == [16, 32.0]
    expected = base_weights_plus(own, scale=2.0)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert max(float((merged[name] - expected[name]).abs().max()) for name in expected) <= 1e-5


def base_weights_plus(adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    weights = {name: tensor.float() for name, tensor in load_file(Path(HF) / "model.safetensors").items()}
    factors = adapters(adapter)
    for name in factors:
        if name.endswith(".lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            weights[target] = weights[target] + scale * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    return weights


def test_the_trainer_starts_from_an_imported_adapter(run_ranks, exported, tmp_path):
    """What to-megatron writes is for --load: in another layout, at iteration 0, with the adapter's update in place; and
    what the run then saves tells the converter its LoRA options."""
    checkpoint = str(tmp_path / "checkpoint")
    given = {"hf_model": HF, "save": checkpoint, "adapter": str(exported / "adapter"), "dtype": "float32"}
    run_ranks(1, "cases_convert.convert", calls=[("import_adapter", given)])
    argv = (
        "--config conf/tiny_cpu.yaml --rollout-engine fake rollout.prompts_per_batch=4 rollout.samples_per_prompt=2 "
        "rollout.batches=1 rollout.eval_samples=4 --micro-batch-size 2 --global-batch-size 8 --lora-rank 8 "
        f"--lora-alpha 16 lora.targets=linear_qkv,linear_proj,linear_fc1,linear_fc2 --load {checkpoint} "
        f"--save {tmp_path / 'run'} --save-interval 1 log.run_dir={tmp_path / 'log'} --lr 0 --min-lr 0"
    ).split()
    other = [word if word != "16" else "32" for word in argv]
    for said in run_ranks(2, "run", argv=other):
        assert (
            f"the checkpoint {checkpoint}/release was saved with lora.alpha=16.0, this run has lora.alpha=32.0" in said
        )
    assert run_ranks(2, "run", argv=argv) == ["", ""]
    first = json.loads((tmp_path / "log" / "metrics.jsonl").read_text().splitlines()[0])
    deltas = base_weights_plus(exported / "adapter", 2.0)
    base = load_file(Path(HF) / "model.safetensors")
    norm = sum(float((deltas[name] - base[name].float()).square().sum()) for name in deltas) ** 0.5
    assert first["sync/update_norm"] == pytest.approx(norm, rel=1e-4)
    again = {"hf_model": HF, "load": str(tmp_path / "run"), "output": str(tmp_path / "again")}
    assert run_ranks(1, "cases_convert.convert", calls=[("export_adapter", again)]) == [[112]]
    assert_equal(adapters(tmp_path / "again"), adapters(exported / "adapter"))


def test_a_dense_model_and_few_targets(run_ranks, tmp_path):
    """TP cuts gate and up of a dense layer in one piece for each rank; and peft loads nothing of experts whose down
    projection has no adapter, unless it is given one that does nothing."""
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    dense = str(tmp_path / "dense")
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads, initializer_range=0.1)).save_pretrained(
        dense
    )
    few = LORA | {"targets": ["linear_qkv", "linear_fc1", "router"]}
    for name, hf, lora in (("all", dense, LORA), ("few", HF, few)):
        checkpoint, given = str(tmp_path / name), {"hf_model": hf, "load": str(tmp_path / name), "sizes": TP2}
        run_ranks(2, "cases_convert.save", hf=hf, folder=checkpoint, layout=TP2, lora=lora)
        calls = [
            ("export_merged", given | {"output": checkpoint + "-merged"}),
            ("export_adapter", given | {"output": checkpoint + "-adapter"}),
        ]
        run_ranks(2, "cases_convert.convert", calls=calls)
        run_ranks(1, "cases_convert.logits", hf=hf, load=checkpoint, layout={}, output=checkpoint + ".pt")
        megatron = torch.load(checkpoint + ".pt")
        assert (hf_logits(hf) - megatron).abs().max() > 0.5
        assert (hf_logits(checkpoint + "-merged") - megatron).abs().max() <= 1e-4
        assert (hf_logits(hf, Path(checkpoint + "-adapter")) - megatron).abs().max() <= 1e-4


def test_what_cannot_be_converted_is_refused_on_all_ranks(run_ranks, saved, tmp_path):
    """Each of these would overwrite work, write a wrong model, or leave ranks waiting for one another."""
    shallow = tmp_path / "shallow"
    shutil.copytree(HF, shallow)
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    good = {"hf_model": HF, "load": str(saved / "tp2_ep2"), "output": str(tmp_path / "new"), "sizes": EP2}
    refused = {
        "holds no checkpoint": {"load": str(tmp_path / "nowhere")},
        "in {saved}: iter_0000003, choose one with --iteration": {"iteration": 7},
        "is not an empty folder": {"output": str(full)},
        "has no config.json": {"hf_model": str(tmp_path)},
        "is of another model or other adapters": {"hf_model": str(shallow)},
        "needs 4 ranks or a multiple, there are 2": {"sizes": {"expert-model-parallel-size": 4}},
    }
    calls = [("export_adapter", good | odd) for odd in refused.values()]
    for done in run_ranks(2, "cases_convert.convert", calls=calls):
        for text, found in zip(refused, done, strict=True):
            assert text.format(saved=saved / "tp2_ep2") in str(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "shallow"]


def test_adapters_without_a_name_in_the_hugging_face_model_are_refused(run_ranks, tmp_path):
    """Bridge's GLM4-MoE knows experts as TE groups them, and not those of a CPU: it says so in a log, and an adapter
    without experts would be written. On all ranks, or the others would wait."""
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    experts = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
    groups = {"first_k_dense_replace": 1, "topk_group": 1, "n_group": 1}
    config = transformers.Glm4MoeConfig(**shape, **heads, **experts, **groups)
    glm, checkpoint = str(tmp_path / "glm"), str(tmp_path / "checkpoint")
    transformers.Glm4MoeForCausalLM(config).save_pretrained(glm)
    calls = [
        ("import_adapter", {"hf_model": glm, "save": checkpoint, "sizes": EP2}),
        ("export_adapter", {"hf_model": glm, "load": checkpoint, "output": str(tmp_path / "new"), "sizes": EP2}),
    ]
    for _, refused in run_ranks(2, "cases_convert.convert", calls=calls):
        assert "are nothing in the Hugging Face model, " in refused
        assert "layers.1.mlp.experts.local_experts.0.linear_fc1.to_wrap.weight first: Megatron-Bridge" in refused
    assert not (tmp_path / "new").exists()


def test_the_command_works_without_torchrun(run_ranks, exported, tmp_path):
    """`megatron-sglang convert` on one machine, by itself, both ways."""
    back, output = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    model = ["--hf-model", HF]
    argv = ["convert", "to-megatron", *model, "--save", back, "--adapter", str(exported / "resaved")]
    assert run_ranks(1, "cases_convert.command", argv=argv) == [0]
    argv = ["convert", "to-hf", *model, "--load", back, "--output", output, "--adapter-only"]
    assert run_ranks(1, "cases_convert.command", argv=argv) == [0]
    assert_equal(adapters(tmp_path / "out"), adapters(exported / "adapter"))
