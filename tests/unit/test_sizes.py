"""Nothing grows past what can be read in one go."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE, FUNCTION, CLASS, ENTRY, KNOBS = 400, 80, 250, 90, 60

ALLOWED: dict[str, int] = {}
"""Path or path::name -> its lines today. May only shrink: a larger, smaller or missing one fails."""


def test_nothing_is_too_long(repository_files: list[Path]) -> None:
    """The limits of docs/development.md, for the package, scripts and tests alike."""
    too_long: dict[str, int] = {}
    for path in (path for path in repository_files if path.suffix == ".py"):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        lines = len(text.splitlines())
        if lines > (ENTRY if name == "pretrain_gspo.py" else FILE):
            too_long[name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                    too_long[f"{name}::{node.name}"] = lines
    assert too_long == ALLOWED


def test_own_options_stay_few() -> None:
    """Every option is a promise. `seed` is Megatron's own and does not count."""
    from megatron_sglang.config_check import field_types

    assert len(field_types().keys() - {"seed"}) <= KNOBS


def test_every_folder_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    """pytest leaves out folders by their names, `dist` among them, and says nothing: 160 tests were not run for it."""
    left_out = request.config.getini("norecursedirs")
    folders = {folder.name for path in (ROOT / "tests").rglob("test_*.py") for folder in path.relative_to(ROOT).parents}
    assert {"unit", "dist", "cpu_e2e"} <= folders
    assert [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in left_out)] == []
