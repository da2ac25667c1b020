"""Is the traced layout exact, for every model and engine layout? Traces, self-tests, and measures what a trace costs.

    python benchmarks/layout_matrix.py [--only qwen3_moe,deepseek_v3] [--output benchmarks/results/layout_matrix.json]

"live": a real engine, through its API. "hook": inside SGLang's ranks right after they built the model, for what cannot
serve on a CPU; there SGLang's padding for CPUs is off and its loaders also run as on a GPU. Rows of the 30B shape have
meta parameters: trace and coverage, no weights. A row that is in the output already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cpu_e2e")]

from launch import interruptible  # noqa: E402

from megatron_sglang.engine.options import EngineOptions, server_args  # noqa: E402
from megatron_sglang.engine.trace_offline import as_on_gpu  # noqa: E402
from megatron_sglang.layout import RankLayout, fold, problems  # noqa: E402

TIMEOUT_S = 400.0
DENSE, SPARSE = ("qwen3", "qwen3_tied", "llama"), ("qwen3_moe", "mixtral", "glm4_moe")
CASES = [
    *((model, tp, 1, "live", "float32") for model in (*DENSE, *SPARSE) for tp in (1, 2)),
    *((model, 2, 2, "live", "float32") for model in SPARSE),
    *(("deepseek_v3", tp, ep, "hook", "float32") for tp, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))),
    *((model, 4, 1, "hook", "float32") for model in (*DENSE, *SPARSE)),
    *((model, 4, 2, "hook", "float32") for model in SPARSE),
    ("glm4_moe", 2, 1, "hook", "bfloat16"),
    *(("30B", tp, ep, "meta", "bfloat16") for tp, ep in ((1, 1), (2, 1), (2, 2), (4, 1))),
]
"""(model, tp, ep, how, engine dtype)."""


def shapes_30b() -> dict[str, tuple[int, ...]]:
    """The 18,867 tensors of Qwen3-30B-A3B."""
    hidden, moe, vocab = 2048, 768, 151936
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(48):
        base = f"model.layers.{layer}."
        attention = {
            "q_proj": (4096, hidden),
            "k_proj": (512, hidden),
            "v_proj": (512, hidden),
            "o_proj": (hidden, 4096),
        }
        shapes |= {base + f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {base + f"self_attn.{name}.weight": (128,) for name in ("q_norm", "k_norm")}
        shapes |= {base + f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes[base + "mlp.gate.weight"] = (128, hidden)
        for expert in range(128):
            name = base + f"mlp.experts.{expert}."
            shapes |= {name + f"{part}_proj.weight": (moe, hidden) for part in ("gate", "up")}
            shapes[name + "down_proj.weight"] = (hidden, moe)
    return shapes


def make_folder(model: str, folder: Path) -> Path:
    from tiny_models import make_model

    if model != "30B":
        return make_model(model, folder)
    make_model("qwen3_moe", folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    config |= {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    config |= {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_local_experts": 128}
    config |= {"num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    return folder


def summary(layouts: Sequence[RankLayout], names: Sequence[str]) -> dict[str, Any]:
    text = [layout.to_json() for layout in layouts]
    assert [RankLayout.from_json(one).to_json() for one in text] == text
    return {
        "hf_tensors": len(names),
        "writes": [len(layout.writes) for layout in layouts],
        "folds": [len(fold(layout.writes)) for layout in layouts],
        "consts": sum(write.const is not None for layout in layouts for write in layout.writes),
        "casts": sum(write.cast is not None for layout in layouts for write in layout.writes),
        "derived": [len(layout.derived) for layout in layouts],
        "aliases": layouts[0].aliases,
        "generic": len({name for layout in layouts for name in layout.generic}),
        "problems": problems(layouts, names),
        "json_bytes": len(text[0]),
        "zlib_bytes": len(zlib.compress(text[0].encode())),
    }


def options_of(folder: Path, tp: int, ep: int, dtype: str, log: Path) -> EngineOptions:
    small = {"max_total_tokens": 1024, "max_running_requests": 4, "mem_fraction": 0.1}
    return EngineOptions(
        str(folder), tp_size=tp, ep_size=ep, dtype=dtype, device="cpu", log_path=str(log), **small  # pyright: ignore
    )  # fmt: skip


def run_live(folder: Path, tp: int, ep: int, dtype: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from megatron_sglang.engine import create_engine

    weights = load_file(folder / "model.safetensors")
    with create_engine(options_of(folder, tp, ep, dtype, folder / "engine.log")) as engine:
        began = time.perf_counter()
        layouts = engine.layout({name: tuple(tensor.shape) for name, tensor in weights.items()})
        seconds = time.perf_counter() - began
        tested = engine.self_test(weights)
    return summary(layouts, list(weights)) | {"seconds": round(seconds, 2), "self_test": tested}


def run_hook(folder: Path, tp: int, ep: int, dtype: str, meta: bool) -> dict[str, Any]:
    """Start SGLang with `hook` in its ranks; collect what they leave, then end all of it."""
    from safetensors import safe_open

    from megatron_sglang.cpu import sglang_server as cpu
    from megatron_sglang.engine import segments

    left = segments.Segments(folder)
    found = [folder / f"{rank}.json" for rank in range(tp)]
    log = folder / "engine.log"
    order = {"folder": str(folder), "tp": tp, "ep": ep, "dtype": dtype, "meta": meta}
    environment = os.environ | cpu.environment(tp, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(path.exists() for path in found):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("no result; last lines of the log:\n" + log.read_text()[-1500:])
            time.sleep(0.2)
    finally:
        left.look()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        segments.remove(folder)
    replies = [json.loads(path.read_text()) for path in found]
    if meta:
        names = list(shapes_30b())
    else:
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = list(file.keys())
    layouts = [RankLayout.from_json(reply.pop("layout")) for reply in replies]
    merged = {key: [reply[key] for reply in replies] for key in replies[0]}
    return summary(layouts, names) | merged


def child(order: dict[str, Any]) -> None:
    """In a process of its own: SGLang as far as the built model."""
    from megatron_sglang.cpu import sglang_server as cpu
    from megatron_sglang.engine import sglang_server

    folder = Path(order["folder"])
    cpu.install(str(folder), seeded_sampling=False)
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.model_executor import model_runner
    from sglang.srt.server_args import PortArgs

    PortArgs.init_new = staticmethod(sglang_server._named(PortArgs.init_new, folder.name))  # see engine/segments.py
    # Heads and experts stay as on a GPU; DeepSeek's rope has no CPU version.
    model_runner.adjust_config_with_unaligned_cpu_tp = lambda config, *_, **__: config
    factory.get_rope_cpu = lambda *arguments: factory.get_rope(*arguments[:8])
    build = model_runner.ModelRunner.load_model

    def load_model(self: Any) -> None:
        if order["meta"]:
            self.model = meta_model(self)
        else:
            build(self)
        hook(self.model, folder, order)

    model_runner.ModelRunner.load_model = load_model
    options = options_of(folder, order["tp"], order["ep"], order["dtype"], folder / "engine.log")
    arguments = server_args(options, 31500 + os.getpid() % 20000)
    Engine(**arguments)


def meta_model(runner: Any) -> Any:
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    with loader.set_default_torch_dtype(runner.model_config.dtype), torch.device("meta"):
        return loader._initialize_model(runner.model_config, LoadConfig(load_format="dummy"), None)


def hook(model: Any, folder: Path, order: dict[str, Any]) -> None:
    """In each rank: trace, self-test, leave the result, and wait for the end."""
    import torch
    from safetensors.torch import load_file

    from megatron_sglang.engine.self_test import self_test
    from megatron_sglang.engine.trace_loader import trace

    rank = torch.distributed.get_rank()
    dtype = getattr(torch, order["dtype"])
    weights = {} if order["meta"] else {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    shapes = shapes_30b() if order["meta"] else {name: tuple(tensor.shape) for name, tensor in weights.items()}
    specs = {name: (shape, dtype) for name, shape in shapes.items()}
    as_on_gpu(True)
    began, cpu_began = time.perf_counter(), time.process_time()
    layout = trace(model, specs, rank)
    reply: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu_began, 2),
        "layout": layout.to_json(),
    }
    if weights:
        reply["self_test_gpu_branch"] = self_test(model, weights, rank)
        as_on_gpu(False)
        reply["branches_equal"] = set(trace(model, specs, rank).writes) == set(layout.writes)
        reply["self_test"] = self_test(model, weights, rank)
    path = folder / f"{rank}.json"
    path.with_suffix(".partial").write_text(json.dumps(reply))
    path.with_suffix(".partial").replace(path)
    time.sleep(TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/layout_matrix.json")
    chosen = parser.parse_args()
    if chosen.child:
        child(json.loads(chosen.child))
        return
    report = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"rows": {}}
    packages = ("torch", "sglang", "transformers")
    report |= {"machine": f"{platform.machine()}, CPU", "versions": {name: metadata.version(name) for name in packages}}
    results = report["rows"]
    for model, tp, ep, how, dtype in CASES:
        key = f"{model} tp{tp} ep{ep} {dtype} {how}"
        if (chosen.only and model not in chosen.only.split(",")) or "error" not in results.get(key, {"error": 1}):
            continue
        began = time.perf_counter()
        with interruptible(), tempfile.TemporaryDirectory() as temporary:
            folder = make_folder(model, Path(temporary))
            try:
                run = (
                    run_live(folder, tp, ep, dtype) if how == "live" else run_hook(folder, tp, ep, dtype, how == "meta")
                )
            except Exception as error:  # noqa: BLE001  the other rows are worth having
                run = {"error": f"{type(error).__name__}: {error}"}
        results[key] = {"model": model, "tp": tp, "ep": ep, "how": how, "dtype": dtype} | run
        print(f"{key}: {time.perf_counter() - began:.0f} s", run.get("error", run.get("problems")), flush=True)
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
