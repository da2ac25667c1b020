"""Tool calls in a turn's text, and the calculator.

    plain   calc(47*38-9)                                                                    name(argument)
    json    <tool_call>{"name": "calc", "arguments": {"expression": "47*38-9"}}</tool_call>  Qwen's and Hermes's

Nothing a model writes is evaluated by Python: `calculate` walks the syntax tree of an expression of bounded length,
knows numbers and seven operators, and refuses results that grow.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CallFormat = Literal["plain", "json"]

MAX_CHARACTERS = 200
MAX_MAGNITUDE = 10**15
MAX_EXPONENT = 64

_CHARACTERS = re.compile(r"[-+*/%().eE\d\s]*", re.ASCII)
_PLAIN = re.compile(r"\s*([A-Za-z_]\w*)\((.*)\)\s*", re.DOTALL)
_STARTED = re.compile(r"\s*([A-Za-z_]\w*)\(")
_JSON = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ToolError(Exception):
    """A call that cannot be carried out; its text is for the model to read."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and its one argument."""

    name: str
    argument: str


def find_call(text: str, form: CallFormat = "plain", stopped_by: str = "") -> Call | None:
    """The call that a turn makes; None where it makes none. `ToolError` for one that is begun and not well formed.

    plain: the whole turn is the call. json: the first call in the turn; of its arguments the first one counts.
    stopped_by: the stop text that was cut from the turn's end; one that closes the call is part of it.
    """
    if form == "plain":
        if match := _PLAIN.fullmatch(text) or _PLAIN.fullmatch(text + stopped_by):
            return Call(match[1], match[2])
        if _STARTED.match(text):
            raise ToolError("call is not closed")
        return None
    match = _JSON.search(text + stopped_by)
    if match is None:
        if "<tool_call>" in text:
            raise ToolError("call is not closed")
        return None
    try:
        call = json.loads(match[1])
        return Call(str(call["name"]), str(next(iter(call["arguments"].values()))))
    except (ValueError, RecursionError) as error:
        raise ToolError("call is not JSON") from error
    except (TypeError, KeyError, AttributeError, StopIteration) as error:
        raise ToolError("call needs name and arguments") from error


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text; `ToolError` for anything else, and for large numbers.

    >>> calculate("47*38 - 9"), calculate("7/2")
    ('1777', '3.5')
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError("expression is too long")
    try:
        if not _CHARACTERS.fullmatch(expression):
            raise SyntaxError("other characters than those of numbers and operators")
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError("invalid expression") from error
    value = _value(tree.body)
    return str(value) if isinstance(value, int) else f"{value:.10g}"


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            try:
                return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
            except ZeroDivisionError:
                raise ToolError("division by zero") from None
    raise ToolError("only numbers and + - * / // % **")


def _power(base: float, exponent: float) -> float:
    if not isinstance(exponent, int) or not 0 <= exponent <= MAX_EXPONENT:
        raise ToolError(f"exponents are whole, 0 to {MAX_EXPONENT}")
    value: float = 1
    for _ in range(exponent):
        value = _bounded(value * base)
    return value


def _bounded(value: float) -> float:
    if not -MAX_MAGNITUDE <= value <= MAX_MAGNITUDE:
        raise ToolError("number is too large")
    return value
