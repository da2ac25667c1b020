"""The Lean verifier, with a stand-in for Lean (fixtures/fake_lean.py): Lean itself cannot be had in this test."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_sglang.errors import ConfigError, RewardError, SandboxError, SetupError
from megatron_sglang.rewards import create_reward
from megatron_sglang.rewards.lean import STANDARD_AXIOMS, Lean, judge, theorem_of
from megatron_sglang.rewards.registry import Options, _lean
from megatron_sglang.types import Completion, Prompt

PROBLEM = {"prefix": "theorem two : 1 + 1 = 2 := by\n  ", "suffix": "\n", "middle": "rfl"}


@pytest.fixture(scope="module")
def toolchain(tmp_path_factory):
    """A folder laid out as a toolchain, with the stand-in as bin/lean, and a project folder."""
    root = tmp_path_factory.mktemp("lean")
    (root / "bin").mkdir()
    (root / "project").mkdir()
    source = (Path(__file__).parent / "fixtures" / "fake_lean.py").read_text()
    lean = root / "bin" / "lean"
    lean.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{source}")
    lean.chmod(0o755)
    root.chmod(0o755)
    return root


@pytest.fixture(scope="module")
def lean(toolchain):
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{toolchain / 'bin'}:{path}"
    verifier = Lean(str(toolchain / "project"), timeout_s=8.0, workers=2, visible=[sys.base_prefix])
    os.environ["PATH"] = path
    yield verifier
    verifier.close()


def score(lean, text, finish_reason="stop", **fields):
    prompt = Prompt("t", (1,), "fim_lean", PROBLEM | fields)
    (result,) = lean.score([(prompt, Completion((1,), (0.0,), finish_reason, 0, text))])
    return result


def test_accepts_a_proof_and_runs_it_isolated(lean):
    assert score(lean, "rfl").passed
    assert score(lean, "rfl -- uses:propext uses:Classical.choice").value == 1.0
    assert lean.tier.endswith("in namespaces")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("oops", "error at line 2: unknown identifier 'oops'"),
        ("rfl -- uses:Lean.ofReduceBool", "forbidden: Lean"),
        ("rfl -- uses:my_own", "axioms: my_own"),
        ("sorry", "forbidden: sorry"),
        ("(by admit)", "forbidden: admit"),
        ("native_decide", "forbidden: native_decide"),
        ("rfl\n#eval 1", "forbidden: #"),
        ("rfl\naxiom cheat : False", "forbidden: axiom"),
        ("rfl\nmacro_rules", "forbidden: macro_rules"),
        ("rfl\nrun_cmd f", "forbidden: run_cmd"),
        ("f ..axiom cheat : False", "forbidden: axiom"),
        ("exact 'a'by_elab x", "forbidden: by_elab"),
        ("_root_.Lean.Elab.f", "forbidden: Lean"),
        (
            "decide\n\nnamespace Evil\ntheorem two : True := trivial -- prints:Evil.two",
            "the axioms of two were not printed",
        ),
    ],
)
def test_rejects_with_the_reason(lean, text, detail):
    result = score(lean, text)
    assert (result.value, result.passed) == (0.0, False)
    assert result.detail == detail


def test_words_that_only_look_forbidden_are_allowed(lean):
    assert score(lean, "exact my_admit.axiom_of h.import' -- Leaning, IOU").passed


def test_sorry_in_the_problem_itself_is_seen_by_lean(lean):
    assert score(lean, "rfl", suffix="\n-- sorry\n").detail == "uses sorry"


def test_theorem_comes_from_the_entry_point_or_the_prefix(lean):
    assert score(lean, "rfl", entry_point="Named.two").passed
    assert score(
        lean, "rfl", preamble="namespace A.B\n", prefix="@[simp] protected theorem two.{u} : a = b := by\n"
    ).passed
    with pytest.raises(RewardError, match="'t' has no prefix, suffix or theorem"):
        score(lean, "rfl", prefix="example : True := by ")


def test_unfinished_completion_is_not_run(lean):
    assert score(lean, "hang", finish_reason="length").detail == "not finished: length"


def test_files_of_the_machine_are_hidden_and_none_can_be_written(lean):
    for path in ("/etc/passwd", __file__, "/proc/1/root/etc"):
        assert "is not there" in score(lean, f"peek:{path}").detail


def test_endless_checks_are_killed_and_endless_output_is_cut(toolchain, monkeypatch):
    monkeypatch.setenv("PATH", f"{toolchain / 'bin'}:{os.environ['PATH']}")
    lean = Lean(str(toolchain / "project"), timeout_s=3.0, workers=1, visible=[sys.base_prefix])
    before = psutil.Process().children(recursive=True)
    assert score(lean, "hang").detail == "timeout"
    assert score(lean, "spill").detail.startswith("lean said: xxx")
    assert psutil.Process().children(recursive=True) == before
    lean.close()


def test_missing_lean_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(SetupError, match="install elan"):
        create_reward("fim_lean", lean_project=str(tmp_path))
    with pytest.raises(ConfigError, match="needs the folder"):
        create_reward("fim_lean", lean_project=None)


def test_lean_that_cannot_be_isolated_is_refused(toolchain, monkeypatch):
    """Its interpreter is not among the visible folders, so that nothing starts inside."""
    monkeypatch.setenv("PATH", f"{toolchain / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="cannot be isolated"):
        Lean(str(toolchain / "project"), timeout_s=20.0, workers=1)
    unsafe = Lean(str(toolchain / "project"), timeout_s=20.0, workers=1, unsafe=True)
    assert unsafe.tier.endswith("unsafe-local")
    assert score(unsafe, "rfl").passed
    unsafe.close()


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("", "two"),
        ("namespace A.B\n", "A.B.two"),
        ("namespace A\nnamespace B\nend A.B\n", "two"),
        ("namespace A\nnoncomputable section\nend\nsection C\n", "A.two"),
        ("mutual\nend\nnamespace A\n  theorem one : p := q\n", "A.two"),
        ("end\nend A\n", "two"),
    ],
)
def test_the_full_name_has_the_open_namespaces(before, name):
    """Asked for by another name, Lean would speak of another theorem, or of none."""
    prefix = PROBLEM["prefix"]
    assert theorem_of("t", {"preamble": before, "prefix": prefix, "suffix": ""}) == name
    assert theorem_of("t", {"preamble": before.rstrip("\n"), "prefix": prefix, "suffix": ""}) == name
    assert theorem_of("t", {"prefix": before + prefix, "suffix": ""}) == name
    rooted = prefix.replace("two", "_root_.two")
    assert theorem_of("t", {"preamble": before, "prefix": rooted, "suffix": ""}) == "two"


def test_more_memory_than_a_completions_code_has(toolchain, monkeypatch):
    monkeypatch.setenv("PATH", f"{toolchain / 'bin'}:{os.environ['PATH']}")
    options = Options("namespaces", 1, 8.0, 512, False, True, False, str(toolchain / "project"))
    for asked, given in ((512, 8192), (20_000, 20_000)):
        with contextlib.closing(_lean(replace(options, memory_mb=asked))) as lean:
            assert lean._memory_mb == given


RECORDED_AXIOMS = (
    '{"caption":"","data":"\'two\' depends on axioms: [propext,\\n Classical.choice,\\n Quot.sound]","endPos":'
    '{"column":6,"line":9},"fileName":"<stdin>","isSilent":false,"keepFullRange":false,"kind":"[anonymous]",'
    '"pos":{"column":0,"line":9},"severity":"information"}\n'
)


@pytest.mark.parametrize(
    ("output", "status", "line", "verdict"),
    [
        (RECORDED_AXIOMS, 0, 9, ""),
        (RECORDED_AXIOMS.replace("Quot.sound", "sorryAx"), 0, 9, "axioms: sorryAx"),
        (RECORDED_AXIOMS, 0, 8, "the axioms of two were not printed"),
        (RECORDED_AXIOMS * 2, 0, 9, "the axioms of two were not printed"),
        (RECORDED_AXIOMS.replace("'two'", "'one'"), 0, 9, "the axioms of two were not printed"),
        (RECORDED_AXIOMS.replace("'two'", "'Evil.two'"), 0, 9, "the axioms of two were not printed"),
        (RECORDED_AXIOMS, 134, 9, "lean ended with status 134"),
        ("", 0, 9, "the axioms of two were not printed"),
        ("Stack overflow detected. Aborting.\n", 134, 9, "lean said: Stack overflow detected. Aborting."),
    ],
)
def test_output_of_lean_is_read_strictly(output, status, line, verdict):
    assert judge(output, status, line=line, theorem="two", allowed=STANDARD_AXIOMS) == verdict
