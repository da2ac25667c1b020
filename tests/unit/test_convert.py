"""The converter's pure parts: PEFT's file format, fused factors, output folders."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sglang.config import LoraConfig
from megatron_sglang.errors import ConfigError, DataError
from megatron_sglang.weights import convert, standalone, write
from megatron_sglang.weights.peft_format import CONFIG, WEIGHTS, AdapterFolder, AdapterWriter
from megatron_sglang.weights.progress import progress
from megatron_sglang.weights.shard_folder import INDEX, continued, require_continuable, state_of_files
from megatron_sglang.weights.write import RECORD, partial_name

SOURCE = {"model": "base", "checkpoint": "iter_0000003"}
TENSORS = {f"t{index}": torch.tensor([index, index + 0.5]) for index in range(7)}
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


def factors(modules: list[str], rank: int = 2, size: int = 6) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (torch.randn(rank, size), torch.randn(size, rank)) for name in modules}


def write_adapter(
    folder: Path, given: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int = 2, alpha: float = 4
) -> None:
    """All of an adapter; the last module first, since order must not matter."""
    shapes = {name: (down.shape, up.shape) for name, (down, up) in given.items()}
    dtype = next(iter(given.values()))[0].dtype
    writer = AdapterWriter(folder, shapes, dtype, rank=rank, alpha=alpha, base="base")
    for name in reversed(given):
        writer.extend({name: given[name]})
    writer.close()


def adapter(folder: Path, modules: list[str], **config: Any) -> Path:
    """An adapter folder with other options than we write."""
    write_adapter(folder, factors(modules))
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Names, tensors, scale and the rank that Megatron needs, which is three times r where q, k and v differ."""
    given = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in factors(ATTENTION).items()}
    write_adapter(tmp_path, given)
    folder = AdapterFolder(tmp_path, experts=0)
    assert sorted(folder.modules) == sorted(ATTENTION)
    for name, (down, up) in given.items():
        found = folder.factors(name)
        assert found is not None
        assert torch.equal(found.down, down)
        assert torch.equal(found.up, up)
        assert found.scale == 2.0
    assert folder.factors("model.layers.1.self_attn.q_proj") is None
    lora = folder.lora_config(None)
    assert (lora.rank, lora.alpha, lora.targets) == (6, 12.0, ("linear_qkv", "linear_proj"))
    with pytest.raises(DataError, match="--lora-rank 4 is below 6"):
        folder.lora_config(4)


def test_each_module_has_the_scale_that_peft_gives_it(tmp_path: Path) -> None:
    """alpha_pattern and rank-stabilised LoRA: a factor that is ignored is a wrong model."""
    config = {"alpha_pattern": {r"self_attn\.v_proj": 8}, "use_rslora": True}
    folder = AdapterFolder(adapter(tmp_path, ATTENTION, **config), experts=0)
    scales = {name[-6]: found.scale for name in ATTENTION if (found := folder.factors(name))}
    assert scales == pytest.approx({"q": 4 / 2**0.5, "k": 4 / 2**0.5, "v": 8 / 2**0.5, "o": 4 / 2**0.5})


def test_dense_layers_beside_experts_are_named_as_parameters(tmp_path: Path) -> None:
    """peft takes gate_proj, up_proj and down_proj for the experts alone and would leave dense and shared layers out."""
    names = ["gate_proj", "up_proj", "down_proj"]
    modules = [f"model.layers.1.mlp.experts.{expert}.{name}" for expert in range(2) for name in names]
    dense = [f"model.layers.0.mlp.{name}" for name in names]
    write_adapter(tmp_path, factors([*modules, *dense, *ATTENTION]))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_parameters"] == [f"{name}.weight" for name in dense]
    write_adapter(tmp_path, factors(dense))
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(names)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora=True has no counterpart"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 has changed the base"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights=OLoRA has changed the base"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    """Read as plain LoRA they would load, and be another model."""
    with pytest.raises(DataError, match=text):
        AdapterFolder(adapter(tmp_path, ATTENTION, **config), experts=0)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starts_that_leave_the_base_alone_are_read(tmp_path: Path, start: bool | str) -> None:
    assert AdapterFolder(adapter(tmp_path, ATTENTION, init_lora_weights=start), experts=0).modules


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"), "lora_B"),
        (
            lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(1)}),
            "no factor of a linear layer",
        ),
        (lambda state: state.update({"base_model.model.x.experts.lora_B.weight": torch.zeros(4, 3)}), "2 experts"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    """Half an adapter, or one of a model with other experts."""
    state = load_file(adapter(tmp_path, ATTENTION) / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=text):
        AdapterFolder(tmp_path, experts=2)


def test_a_module_without_a_place_in_megatron_is_refused(tmp_path: Path) -> None:
    """An adapter of lm_head would be dropped in silence."""
    folder = AdapterFolder(adapter(tmp_path, [*ATTENTION, "lm_head"]), experts=0)
    with pytest.raises(DataError, match="lm_head, for which"):
        folder.lora_config(None)


def test_shards_stay_within_their_size_and_the_index_finds_all(tmp_path: Path) -> None:
    """Tensors that are views of others, and one that is larger than a shard."""
    whole = torch.randn(4, 100)
    named = {f"row{index}": whole[index] for index in range(4)} | {"turned": whole.T, "small": torch.zeros(3)}
    target = tmp_path / "model"
    with continued(target, SOURCE, shard_bytes=900) as folder:
        folder.extend(named.items())
        folder.close()
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == 8 * 400 + 12
    found = {name: load_file(target / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in target.glob("*.safetensors"))
    assert len(list(target.iterdir())) == 1 + 4
    assert (target / "model-00001-of-00004.safetensors").stat().st_mode & 0o444 == target.stat().st_mode & 0o444


def interrupted(target: Path, error: BaseException, count: int = 5) -> Path:
    """A conversion with a tensor a shard, of which `count` come before `error`; where it lies then."""

    def run() -> None:
        with continued(target, SOURCE, shard_bytes=8) as folder:
            folder.extend(list(TENSORS.items())[:count])
            raise error

    with pytest.raises(type(error)) as raised:
        run()
    assert any("4 finished shards stay in" in note for note in getattr(raised.value, "__notes__", ()))
    return partial_name(target)


def finish(target: Path) -> dict[str, torch.Tensor]:
    """The same conversion once more, to its end; what of it was written anew."""
    with continued(target, SOURCE, shard_bytes=8) as folder:
        new = {name: tensor for name, tensor in TENSORS.items() if name not in folder.done}
        folder.extend(new.items())
        folder.close()
    where = json.loads((target / INDEX).read_text())["weight_map"]
    assert where.keys() == TENSORS.keys()
    assert all(torch.equal(load_file(target / file)[name], TENSORS[name]) for name, file in where.items())
    assert {path.name for path in target.iterdir()} == {INDEX, *where.values()}
    return new


def test_an_interrupted_folder_is_continued(tmp_path: Path) -> None:
    """Finished shards are not written again, and a file that was not finished is no part of the result."""
    partial = interrupted(tmp_path / "model", KeyboardInterrupt())
    (partial / "part-00005").write_bytes(b"half")
    (partial / "config.json").write_text("{}")
    times = {f"t{index}": (partial / f"part-{index + 1:05d}").stat().st_mtime_ns for index in range(4)}
    assert finish(tmp_path / "model").keys() == {"t4", "t5", "t6"}
    where = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    assert {name: (tmp_path / "model" / where[name]).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda part: part.write_bytes(part.read_bytes()[:-1] + b"\xff"), {"t1"}),
        (lambda part: part.write_bytes(part.read_bytes()[:-4]), {"t1"}),
        (lambda part: part.unlink(), {"t1"}),
        (lambda part: part.rename(part.with_name("model-00002-of-00007.safetensors")), set()),
    ],
)
def test_only_whole_shards_are_kept(tmp_path: Path, damage: Callable[[Path], object], again: set[str]) -> None:
    """A machine that went down can leave any of these. A shard under its final name is a closing that was cut short."""
    partial = interrupted(tmp_path / "model", KeyboardInterrupt())
    record = json.loads((partial / RECORD).read_text())
    record["shards"][1]["file"] = "model-00002-of-00007.safetensors"
    (partial / RECORD).write_text(json.dumps(record))
    damage(partial / "part-00002")
    assert finish(tmp_path / "model").keys() == {"t4", "t5", "t6"} | again


def test_an_unfinished_conversion_of_something_else_is_refused(tmp_path: Path) -> None:
    """Shards of two checkpoints in one model would load; and another command must not throw away hours of work."""
    target = tmp_path / "model"
    interrupted(target, KeyboardInterrupt())
    other = SOURCE | {"checkpoint": "iter_0000005"}
    with pytest.raises(
        DataError, match=r"another checkpoint: iter_0000003, asked for iter_0000005; give the arguments of then"
    ):
        require_continuable(target, other)
    with pytest.raises(DataError, match="another checkpoint"), continued(target, other):
        pass
    with pytest.raises(DataError, match="unfinished conversion of a model"), write.complete_or_absent(target):
        pass
    assert finish(target).keys() == {"t4", "t5", "t6"}
    with pytest.raises(DataError, match="nothing is overwritten"), continued(target, SOURCE):
        pass


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """Someone who thinks that a conversion hangs starts it once more."""
    with continued(tmp_path / "model", SOURCE) as folder:
        with pytest.raises(DataError, match="being written by another process"), continued(tmp_path / "model", SOURCE):
            pass
        folder.extend(TENSORS.items())
        folder.close()
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == TENSORS.keys()


def test_what_the_next_call_would_end_in_as_well_leaves_nothing(tmp_path: Path) -> None:
    """Shards of a model that cannot be converted are only in the way; so is a folder without any."""

    def run(error: Exception, count: int) -> None:
        with continued(tmp_path / "model", SOURCE, shard_bytes=8) as folder:
            folder.extend(list(TENSORS.items())[:count])
            raise error

    for error, count in ((DataError("not this model"), 5), (RuntimeError("too early"), 1)):
        with pytest.raises(type(error)):
            run(error, count)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """The most likely end of a long conversion."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def run() -> None:
        with continued(tmp_path / "model", SOURCE, shard_bytes=8) as folder:
            folder.extend(list(TENSORS.items())[:5])
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            folder.extend({"large": torch.zeros(10**4), "next": torch.zeros(1)}.items())

    try:
        with pytest.raises(DataError, match=r"cannot be written: .*make room and give the same command again"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert finish(tmp_path / "model").keys() == {"t5", "t6"}


def test_files_that_were_written_again_are_another_source(tmp_path: Path) -> None:
    """A run that saves the same iteration anew: same path, other weights."""
    (tmp_path / "weights").write_text("one")
    before = state_of_files(tmp_path)
    assert state_of_files(tmp_path) == before
    (tmp_path / "weights").write_text("two")
    os.utime(tmp_path / "weights", ns=(1, 1))
    assert state_of_files(tmp_path) != before


def test_progress_tells_bytes_and_rate(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A log gets one line, from one rank; a bar would fill it."""
    with progress("merging", total=3_000_000, done=1_000_000) as advance:
        advance(2_000_000)
    assert re.fullmatch(
        r"merging: 2\.00MB in \d+\.\d s, \d+(\.\d+)?[kMGT]?B/s, 1\.00MB were there\n", capfd.readouterr().err
    )
    monkeypatch.setenv("RANK", "1")
    with progress("merging", total=1) as advance:
        advance(1)
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    """With percentage, bytes and bytes per second, while it runs."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    code = (
        "import time\nfrom megatron_sglang.weights.progress import progress\n"
        "with progress('merging', 4_000_000) as advance:\n"
        "    for _ in range(4):\n        time.sleep(0.15)\n        advance(1_000_000)\n"
    )
    subprocess.run([sys.executable, "-c", code], stderr=writer, timeout=60, check=True)
    os.close(writer)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert re.search(r"merging:  25%.*1\.00M/4\.00M .*[kM]B/s\]", shown)
    assert re.search(r"merging: 100%.*4\.00M/4\.00M .*[kM]B/s\]", shown)


@pytest.mark.parametrize(("on_cpu", "experts", "grouped"), [(True, 4, None), (False, 4, True), (False, 0, None)])
def test_experts_are_grouped_on_a_gpu_as_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, experts: int, grouped: bool | None
) -> None:
    """Megatron-Bridge has no names for the single experts of GLM4-MoE."""
    monkeypatch.setattr(standalone.cpu_room, "needed", lambda: on_cpu)
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "config.json").write_text(json.dumps({"n_routed_experts": experts}))
    config = standalone._config(tmp_path, LoraConfig(), "float32", {}, base=True)
    assert config.megatron.get("moe-grouped-gemm") is grouped


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--tensor-model-parallel-size=0", "no number of ranks"),
        ("--shard-gb=0", "no size of a file"),
        ("--shard-gb=nan", "no size of a file"),
        ("--shard-gb=inf", "no size of a file"),
    ],
)
def test_sizes_that_are_none_are_refused_by_name(tmp_path: Path, option: str, said: str) -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    folders = [f"--{name}={tmp_path / name}" for name in ("hf-model", "load", "output")]
    with pytest.raises(ConfigError, match=f"{option.split('=')[0]}=.*{said}"):
        convert.run(parser.parse_args(["to-hf", *folders, option]))
