"""Weights merged by the kernel that a GPU would run, in Triton's interpreter: the same numbers, the same delivery."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HF = str(Path(__file__).parents[2] / "examples/tiny_fim/model")
EP2 = {"expert-model-parallel-size": 2}
TP2 = {"tensor-model-parallel-size": 2, "sequence-parallel": True}

COMPILE = """
import json, sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_sglang import copy_kernel, digest_kernel
from megatron_sglang.training import score_kernel
from megatron_sglang.weights import merge_kernel

def loads(kernel, arguments, constants, aligned, warps=4):
    signature = arguments | dict.fromkeys(constants, "constexpr")
    known = [name for name, kind in arguments.items() if kind.startswith("*") or name == "width"] if aligned else []
    pointers = [list(arguments).index(name) for name in known]
    hints = {(at,): [["tt.divisibility", 16]] for at in pointers}
    source, target = ASTSource(kernel, signature, constants, hints), GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]

arguments = {"pointers": "*i64", "table": "*i64", "numbers": "*fp64", "owner": "*i32", "out": "*bf16", "sums": "*fp64",
             "jobs": "i32"}
sizes = {"ROWS": merge_kernel.ROWS, "COLS": merge_kernel.COLS, "RANKS": 32, "LANES": merge_kernel.LANES}
found = []
for dtype in (tl.bfloat16, tl.float32):
    for aligned in (False, True):
        constants = {"WEIGHT": dtype, "FACTOR": dtype, "PRECISION": "ieee", "WIDEN": False, "ALIGNED": aligned, **sizes}
        out = {"out": "*bf16" if dtype == tl.bfloat16 else "*fp32"}
        found.append(loads(merge_kernel._merge, arguments | out, constants, aligned))
sums = {"table": "*i64", "owner": "*i32", "totals": "*i64", "odd": "*i64", "base": "i64", "tensors": "i32",
        "mix_1": "i64", "mix_2": "i64"}
warps, reads, blocks = digest_kernel.SHAPE
each = {"LANES": digest_kernel.SHAPE.lanes, "READS": reads, "BLOCKS": blocks}
for aligned in (False, True):
    for look in (False, True):
        found.append(loads(digest_kernel._sums, sums, {**each, "LOOK": look, "ALIGNED": aligned}, True, warps))
moves = {"addresses": "*i64", "table": "*i64", "owner": "*i32", "flat": "*i64", "begins": "*i64", "totals": "*i64",
         "copies": "i32", "segments": "i32", "mix_1": "i64", "mix_2": "i64"}
tile = {"ROWS": copy_kernel.ROWS, "COLS": copy_kernel.COLS, "LANES": copy_kernel.LANES}
for back in (False, True):
    for segments in (1, 8):
        constants = {"BACK": back, "ALIGNED": True, **tile, "SEGMENTS": segments}
        found.append(loads(copy_kernel._pass, moves, constants, True, copy_kernel.WARPS))
rows = {"width": "i32", "scale": "fp32"}
reduced = dict.fromkeys(("peaks", "totals", "entropies", "of_logprobs", "of_entropies"), "*fp32")
for kind in ("*bf16", "*fp16", "*fp32"):
    scored = {"logits": kind, "labels": "*i64"}
    for entropy in (False, True):
        constants = {"ENTROPY": entropy, "BLOCK": score_kernel.BLOCK}
        found.append(loads(score_kernel._sums, scored | {"out": "*fp32", "rows": "i32"} | rows, constants, True, 8))
    for given in ((True, False), (False, True), (True, True)):
        constants = dict(zip(("LOGPROB", "ENTROPY"), given)) | {"BLOCK": score_kernel.BLOCK}
        found.append(loads(score_kernel._gradient, scored | reduced | {"out": kind} | rows, constants, True, 8))
large = [[f"{way}.global.v{count}" for count in ("4.b32", "2.b64")] for way in ("st", "ld")]
json.dump([[any(word in ptx for word in words) for words in large] + ["wgmma" in ptx] for ptx in found], sys.stdout)
"""


def test_kernels_compile_for_an_h200() -> None:
    """Without one: what the interpreter runs need not compile. Aligned, 16 bytes go at a time."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, aligned, _, aligned_fp32, *rest = json.loads(done.stdout)
    assert plain == [False, False, True]
    assert aligned == [True, True, True]
    assert aligned_fp32 == [True, True, False], "no TF32"
    assert rest[:2] == [[False, False, False]] * 2, "digests of words at odd places"
    assert rest[2:4] == [[False, True, False]] * 2
    written, read, scored = rest[4:6], rest[6:8], rest[8:]
    assert written == [[True, True, False]] * 2
    assert read == [[False, True, False]] * 2, "what is read back is stored nowhere"
    assert scored == ([[False, True, False]] * 2 + [[True, True, False]] * 3) * 3, "sums, then gradients, of each dtype"


@pytest.mark.parametrize("name", ["ep2", "tp2"])
def test_the_direct_path_sends_what_the_generic_path_exports(run_interpreting_ranks, name) -> None:
    """Rectangles that begin and end anywhere, factors gathered over TP: bit for bit, and equal to torch's merge."""
    layout = {"ep2": EP2, "tp2": TP2}[name]
    arguments = {"engine_ranks": 2, "limit": 100_000, "fused": True, "timeout_s": 300}
    for result in run_interpreting_ranks(2, "direct", hf=HF, layout=layout, **arguments):
        assert result["fused"] > 0
        assert result["in_segments"] > 0
        assert result["wrong"] == 0
        assert result["elements"] == result["wanted"]
        assert 0 <= result["off"] < 1e-6


def test_the_report_is_exact(run_interpreting_ranks) -> None:
    """Norm of the update and share of changed elements, of five weights at once."""
    found = run_interpreting_ranks(1, "cases_merge.grouped_merge", experts=5, chunk=1, fused=True, to="float32")[0]
    assert found["off"] < 1e-6
    assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-6)
    assert found["loss"][0] == 0.0, "in fp32 the cast loses nothing"
    assert found["changed"] > 0.99
    assert list(found["layers"]) == ["1"]


def test_the_report_counts_what_the_cast_loses(run_interpreting_ranks) -> None:
    """The interpreter's cast to bfloat16 cuts where a GPU rounds: it loses up to twice as much."""
    found = run_interpreting_ranks(1, "cases_merge.grouped_merge", experts=5, chunk=1, fused=True)[0]
    reported, exact = found["loss"]
    assert reported == pytest.approx(exact, rel=1e-4)
