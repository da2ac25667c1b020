"""The weakest tier: only programs in a small sublanguage without a way out are run at all.

No import, no class, no exception handling, no `while` on a constant, no name with two underscores, no attribute but
the methods of str, list, dict and set named here, no builtin but the ones named here, no large power or shift. Time
and memory are bounded by the process it runs in.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

METHODS = {
    *("add", "append", "capitalize", "clear", "copy", "count", "difference", "discard", "endswith", "extend", "find"),
    *("get", "index", "insert", "intersection", "isalnum", "isalpha", "isdigit", "islower", "isspace", "isupper"),
    *("items", "join", "keys", "lower", "lstrip", "pop", "remove", "replace", "reverse", "rfind", "rindex", "rsplit"),
    *("rstrip", "sort", "split", "splitlines", "startswith", "strip", "swapcase", "title", "union", "update", "upper"),
    *("values", "zfill"),
}
BUILTINS: dict[str, Any] = {
    builtin.__name__: builtin
    for builtin in (
        *(abs, all, any, bin, bool, chr, dict, divmod, enumerate, filter, float, frozenset, hex, int, isinstance, len),
        *(list, map, max, min, ord, range, repr, reversed, round, set, slice, sorted, str, sum, tuple, zip),
    )
}
BUILTINS["pow"] = lambda base, exponent, modulus: pow(base, exponent, modulus)
NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign),
    *(ast.For, ast.While, ast.If, ast.Expr, ast.Pass, ast.Break, ast.Continue, ast.Assert, ast.Nonlocal),
    *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.NamedExpr, ast.Lambda, ast.IfExp, ast.Dict, ast.Set, ast.ListComp),
    *(ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Compare, ast.Call, ast.keyword, ast.Constant),
    *(ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.List, ast.Tuple, ast.Slice, ast.JoinedStr),
    *(ast.FormattedValue, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)
LARGEST_EXPONENT = 64


class Refused(Exception):
    """The program is not in the sublanguage; the message names the construct and its line."""


def check(source: str) -> None:
    """Raise `Refused` unless every construct of `source` is allowed; `SyntaxError` if it is no Python."""
    for node in ast.walk(ast.parse(source)):
        problem = _problem(node)
        if problem:
            raise Refused(f"{problem} (line {getattr(node, 'lineno', '?')}) is not allowed in the restricted tier")


def _problem(node: ast.AST) -> str:
    match node:
        case ast.FunctionDef(decorator_list=[_, *_]):
            return "a decorator"
        case ast.FunctionDef(name=name) | ast.Name(id=name) | ast.arg(arg=name) if name.startswith("__"):
            return f"the name {name}"
        case ast.Name(id=name) if hasattr(builtins, name) and name not in BUILTINS:
            return f"the builtin {name}"
        case ast.Attribute(attr=name) if name not in METHODS:
            return f"the attribute {name}"
        case ast.BinOp(op=op, right=right) | ast.AugAssign(op=op, value=right) if _may_explode(op, right):
            return f"a power or shift by anything but a constant up to {LARGEST_EXPONENT}"
        case ast.While(test=ast.Constant()):
            return "a while without a condition"
        case _ if not isinstance(node, NODES):
            return f"the construct {type(node).__name__}"
    return ""


def _may_explode(operator: ast.operator, right: ast.expr) -> bool:
    if not isinstance(operator, (ast.Pow, ast.LShift)):
        return False
    return not (isinstance(right, ast.Constant) and type(right.value) is int and right.value <= LARGEST_EXPONENT)
