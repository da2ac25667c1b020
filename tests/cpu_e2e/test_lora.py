"""A PEFT adapter folder of ours in SGLang's own LoRA serving, through /load_lora_adapter; judged by peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tools import engine_options
from safetensors.torch import load_file
from tiny_models import make_model

from megatron_sglang.engine import create_engine
from megatron_sglang.engine.http import Http
from megatron_sglang.weights.peft_format import AdapterWriter

pytestmark = [pytest.mark.cpu_e2e, pytest.mark.timeout(300)]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PROMPT = [7, 8, 9]

WITHOUT_PINNING = """
import torch

torch.Tensor.pin_memory = lambda self, device=None: self


def leave_out(name):
    make = getattr(torch, name)

    def call(*args, pin_memory=False, **named):
        return make(*args, **named)

    call.__module__, call.__qualname__, call.__name__ = "torch", name, name
    setattr(torch, name, call)


for name in ("tensor", "zeros", "empty", "arange"):
    leave_out(name)
"""
"""SGLang 0.5.17 pins host memory for LoRA without asking whether there is a driver (lora/layers.py:457,
lora/backend/torch_backend.py:225, lora/lora.py:533). Pinning changes no value, so its server goes without here."""


def write_adapter(folder: Path, model: Path, leaves: list[str]) -> Path:
    """A random adapter, rank 4, for all layers of these names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in load_file(model).items()}
    shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in leaves}
    factors = {
        name: (torch.randn(4, columns, generator=generator) / 11, 0.3 * torch.randn(rows, 4, generator=generator))
        for name, (rows, columns) in shapes.items()
    }
    pairs = {name: (down.shape, up.shape) for name, (down, up) in factors.items()}
    writer = AdapterWriter(folder, pairs, torch.float32, rank=4, alpha=8, base=str(model.parent))
    writer.extend(factors)
    writer.close()
    return folder


@torch.no_grad()
def peft_logprobs(model: Path, adapter: Path, output: list[int]) -> torch.Tensor:
    """[T], of the tokens of `output` after PROMPT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    logits = PeftModel.from_pretrained(base, adapter).eval()(torch.tensor([PROMPT + output])).logits
    return logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0]


@pytest.mark.parametrize(("name", "leaves"), [("qwen3", ATTENTION + MLP), ("qwen3_moe", ATTENTION)])
def test_sglang_serves_an_adapter_of_ours(
    name: str, leaves: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name or a scale that SGLang reads in another way than peft serves another policy, without a word."""
    model = make_model(name, tmp_path)
    (tmp_path / "adapter").mkdir()
    adapter = write_adapter(tmp_path / "adapter", model / "model.safetensors", leaves)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_PINNING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    lora = {"enable_lora": True, "lora_backend": "torch_native", "max_lora_rank": 4, "lora_target_modules": leaves}
    options = engine_options(model, load_format="auto", max_total_tokens=1024, max_running_requests=4, extra=lora)
    with create_engine(options) as engine:
        server = engine.server
        http = Http(server.port, server.api_key, server.admin_key, server.why_dead)
        loaded = http.post("/load_lora_adapter", {"lora_name": "ours", "lora_path": str(adapter)}, 60)
        assert loaded["success"], loaded
        greedy = {"temperature": 0.0, "max_new_tokens": 8}
        body = {"input_ids": [PROMPT], "sampling_params": [greedy], "return_logprob": True}
        (base,) = http.post("/generate", body, 60, admin=False)
        (ours,) = http.post("/generate", body | {"lora_path": "ours"}, 60, admin=False)
        http.close()
    assert len(ours["output_ids"]) == 8
    assert ours["output_ids"] != base["output_ids"]
    logprobs = torch.tensor([found[0] for found in ours["meta_info"]["output_token_logprobs"]])
    assert (logprobs - peft_logprobs(model, adapter, ours["output_ids"])).abs().max() <= 1e-3
