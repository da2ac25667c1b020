"""The two halves of a verdict, each in a process of its own, in a box of its own.

`solve` holds the code under test and answers calls with literals; it knows neither tests nor expected values.
`judge` holds the tests, which are trusted; whatever the solution's process does, it can only send literals or fall
silent. Channel between them, a strict alternation of one request and one answer:

    solve -> judge   {"ready": true} | {"error": [class, message]}
    judge -> solve   {"args": [...], "kwargs": {...}}
    solve -> judge   {"value": literal} | {"error": [class, message]}
    judge -> driver  {"ok": bool, "detail": str, "gone": bool} per test | {"broken": str}
"""

from __future__ import annotations

import builtins
import random
import socket
from typing import Any

from megatron_sglang.rewards.box.literals import ChannelError, framed, pack, receive, same, send, unpack

_NOT_RAISED = (UnicodeError, StopIteration)
"""Builtin exceptions that the tests do not get as such: of the first a message alone makes none; the second would end
`all(map(candidate, ...))` of a test early, as if all had passed."""


class SolutionError(Exception):
    """An exception of the solution that is not a builtin one, or one of `_NOT_RAISED`."""


class SolutionGone(BaseException):
    """The solution's process does not answer any more; no `except Exception` of a test may swallow it."""


def solve(job: dict[str, Any], channels: list[socket.socket], limit: int) -> None:
    """Run the solution's source, then answer calls until the other side hangs up."""
    (channel,) = channels
    random.seed(0)
    try:
        function = _load(job)
    except BaseException as error:  # noqa: BLE001 - a process boundary
        send(channel, {"error": _describe(error)}, limit)
        return
    send(channel, {"ready": True}, limit)
    while True:
        call = receive(channel, limit)
        try:
            arguments, keywords = unpack(call["args"]), unpack(call["kwargs"])
            send(channel, {"value": pack(function(*arguments, **keywords))}, limit)
        except BaseException as error:  # noqa: BLE001 - a process boundary
            send(channel, {"error": _describe(error)}, limit)


def _load(job: dict[str, Any]) -> Any:
    namespace: dict[str, Any] = {"__name__": "solution"}
    if job["restricted"]:
        from megatron_sglang.rewards.box import restricted  # imported by the server in that tier only

        restricted.check(job["source"])
        namespace["__builtins__"] = restricted.BUILTINS
    exec(compile(job["source"], "solution", "exec"), namespace)
    if job["entry_point"] not in namespace:
        raise NameError(f"{job['entry_point']} is not defined")
    return namespace[job["entry_point"]]


def _describe(error: BaseException) -> tuple[str, str]:
    try:
        return type(error).__name__, _message(error)[:200]
    except BaseException:  # noqa: BLE001 - the solution's own __str__
        return type(error).__name__, "?"


class Candidate:
    """The solution's function as the tests see it: calls go to the other process and come back as literals."""

    def __init__(self, channel: socket.socket, limit: int, name: str) -> None:
        self.__name__ = name
        self._channel = channel
        self._limit = limit
        self.gone = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.gone:
            try:
                send(self._channel, {"args": pack(list(args)), "kwargs": pack(kwargs)}, self._limit)
            except ChannelError as error:
                self.gone = f"no answer from the solution: {error}"
        return self.answer()

    def answer(self) -> Any:
        """The value of the next answer; the solution's exception is raised here, as its builtin class if it has one."""
        name = message = ""
        value = None
        if not self.gone:
            try:
                answer = receive(self._channel, self._limit)
                if "error" in answer:
                    name, message = map(str, answer["error"])
                elif "ready" not in answer:
                    value = unpack(answer["value"])
            except (ChannelError, TypeError, ValueError, KeyError, RecursionError) as error:
                self.gone = f"no answer from the solution: {error}"
        if self.gone:
            raise SolutionGone(self.gone)
        if not name:
            return value
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NOT_RAISED):
            raise kind(message)
        raise SolutionError(f"{name}: {message}")


def judge(job: dict[str, Any], channels: list[socket.socket], limit: int) -> None:
    """Run the tests against the solution at the other end of `channels[0]`; verdicts go to `channels[1]`."""
    calls, verdicts = channels
    candidate = Candidate(calls, limit, job["entry_point"])
    random.seed(0)
    namespace: dict[str, Any] = {"__name__": "tests", "candidate": candidate}
    try:
        exec(compile(job["preamble"], "preamble", "exec"), namespace)
        tests = [compile(test, "test", "exec") if isinstance(test, str) else test for test in job["tests"]]
        for test in tests:
            if isinstance(test, dict):  # no answer passes one that cannot travel
                framed({"args": test["args"], "kwargs": pack({})}, limit)
                framed({"value": test["expect"]}, limit)
    except Exception as error:  # noqa: BLE001 - a process boundary
        send(verdicts, {"broken": f"{type(error).__name__}: {error}"}, limit)
        return
    unusable = ""
    try:
        candidate.answer()
    except (Exception, SolutionGone) as error:  # noqa: BLE001 - a process boundary
        unusable = _reason(error)
    for test in tests:
        detail = unusable or _run(test, candidate, dict(namespace))
        detail = detail or candidate.gone  # a test must not swallow a solution that vanished
        send(verdicts, {"ok": not detail, "detail": detail[:200], "gone": bool(candidate.gone)}, limit)


def _run(test: Any, candidate: Candidate, namespace: dict[str, Any]) -> str:
    """Why the test fails, or an empty string."""
    try:
        if not isinstance(test, dict):
            exec(test, namespace)
            return ""
        value, expected = candidate(*unpack(test["args"])), unpack(test["expect"])
        return "" if same(value, expected) else f"wrong value {value!r}, expected {expected!r}"
    except SolutionGone as error:
        return str(error)
    except AssertionError as error:
        return f"assertion failed {error}".rstrip()
    except BaseException as error:  # noqa: BLE001 - a process boundary
        return _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, (SolutionError, SolutionGone)):
        return str(error)
    return f"{type(error).__name__}: {_message(error)}".rstrip(": ")


def _message(error: BaseException) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # KeyError quotes its text
