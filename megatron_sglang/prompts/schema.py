"""The schema of a fill-in-the-middle problem, one JSON object:

    id, data_source   str    data_source picks the verifier: "fim_python", "fim_lean", or one registered by the user
    prefix, suffix    str    what stands before and after the hole
    middle            str    the canonical hole
    family            str    for grouped metrics; optional
    preamble          str    lines that verifiers put before the prefix and before the tests; optional. The last one
                             needs no end of line
    pure              bool   prefix + hole + suffix is a function of pure expressions without imports, which a verifier
                             may run without an operating system's sandbox; optional, false
    entry_point       str    fim_python: the function under test; fim_lean: the theorem, optional
    tests             list   fim_python: unit tests, each counted by itself

A test is {"args": [JSON values], "expect": JSON value}: entry_point(*args) must equal `expect` in type and value; or
Python statements as a string that use the name `candidate` and no other name of the solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sglang.errors import DataError

FIM_PYTHON = "fim_python"
FIM_LEAN = "fim_lean"

_REQUIRED: dict[str, type] = {"id": str, "data_source": str, "prefix": str, "suffix": str, "middle": str}
_OPTIONAL: dict[str, type] = {"family": str, "preamble": str, "pure": bool, "entry_point": str}
_REQUIRED_FOR_PYTHON: dict[str, type] = {"entry_point": str, "tests": list}


def preamble_of(problem: Mapping[str, Any]) -> str:
    """Whole lines, so that what follows begins a line of its own."""
    preamble = problem.get("preamble", "")
    return preamble if preamble[-1:] in ("", "\n") else preamble + "\n"


def check_problem(problem: Mapping[str, Any], where: str) -> None:
    """`DataError` that begins with `where` (file and line) if `problem` is not of the schema."""
    required = _REQUIRED | (_REQUIRED_FOR_PYTHON if problem.get("data_source") == FIM_PYTHON else {})
    missing = [name for name in required if name not in problem]
    if missing:
        raise DataError(f"{where}: problem lacks {', '.join(missing)}; expected the fields {', '.join(required)}")
    for name, kind in (required | _OPTIONAL).items():
        if name in problem and not isinstance(problem[name], kind):
            observed = type(problem[name]).__name__
            raise DataError(f"{where}: field {name} is of type {observed}; expected {kind.__name__}")
    if problem["data_source"] == FIM_PYTHON:
        _check_tests(problem["tests"], where)


def _check_tests(tests: list[Any], where: str) -> None:
    if not tests:
        raise DataError(f"{where}: tests is empty; expected at least one test, or no answer could ever score")
    for number, test in enumerate(tests):
        if isinstance(test, str) and "candidate" in test:
            continue
        if not (isinstance(test, dict) and isinstance(test.get("args"), list) and "expect" in test):
            raise DataError(
                f"{where}: tests[{number}] is {str(test)[:80]!r}; "
                'expected {"args": [...], "expect": ...} or statements that use the name candidate'
            )
