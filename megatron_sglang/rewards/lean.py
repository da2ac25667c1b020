"""Scores a hole filled in Lean 4: the file must check without errors, and its theorem without new axioms.

Problem: {"prefix", "suffix", optional "preamble", "entry_point"}; `entry_point` is the theorem's full name, by default
that of the last one declared in the prefix. It is asked for from the root, since a completion may leave a namespace
open in which the same name means another theorem. Elaborating a file runs code, so Lean runs in namespaces where those
work. Words that could bend the check itself (`sorry`, `axiom`, `macro`, `#eval`, ...) are refused in a completion
unseen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sglang.errors import ConfigError, RewardError, SandboxError, SetupError
from megatron_sglang.prompts.schema import preamble_of
from megatron_sglang.rewards.box.command import REFUSED
from megatron_sglang.rewards.boxes import ENVIRONMENT, PACKAGE
from megatron_sglang.types import Completion, Prompt, Score

STANDARD_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
NATIVE_AXIOMS = frozenset({"Lean.ofReduceBool", "Lean.trustCompiler"})
OUTPUT_BYTES = 1 << 20
MEMORY_MB = 8192
"""Of one process at least, whatever is given for a completion's code: it holds the libraries that it imports."""
START_S = 120.0  # `lake env` may have to load a large package graph
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_FORBIDDEN = re.compile(
    r"(?<!\w)(sorry|admit|axiom|constant|opaque|unsafe|extern|implemented_by|import|macro|macro_rules|elab|elab_rules"
    r"|by_elab|syntax|notation|infix[lr]?|prefix|postfix|initialize|builtin_initialize|run_cmd|run_elab|run_meta|run_tac"
    r"|simproc|set_option|attribute|export|deriving|IO|Lean|Elab|Meta|csimp|reduceBool|ofReduceBool)(?![\w'])|#|@\["
)
_DECLARATION = re.compile(r"^\s*(?:@\[[^\]]*\]\s*)?(?:protected\s+)?(?:theorem|lemma)\s+([^\s:({\[]+)", re.MULTILINE)
_SCOPE = re.compile(r"^\s*(?:noncomputable\s+)?(namespace|section|mutual|end)\b[ \t]*([^\s:]*)", re.MULTILINE)
_ROOT = "_root_."
_AXIOMS = re.compile(r"^'(?P<name>.+)' (?:depends on axioms: \[(?P<axioms>[^\]]*)\]|does not depend on any axioms)\s*$")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Where Lean and the project's compiled libraries are."""

    lean: Path
    prefix: Path
    search_path: str


class Lean:
    """`Score.value` is 1.0 or 0.0. Files are checked in parallel, each by a Lean process of its own.

    Raises `SetupError` if Lean is not installed, `SandboxError` if it cannot be isolated and `unsafe` is not given.
    `visible`: folders Lean needs besides its toolchain and the project. `memory_mb` is Lean's own limit.
    """

    def __init__(
        self,
        project: str | None,
        *,
        workers: int = 2,
        timeout_s: float = 60.0,
        memory_mb: int = MEMORY_MB,
        unsafe: bool = False,
        allow_native_decide: bool = False,
        visible: Sequence[str] = (),
    ) -> None:
        if project is None or not Path(project).is_dir():
            raise ConfigError(f"lean_project is {project!r}; fim_lean needs the folder of a Lean project")
        self._project = Path(project).resolve()
        self._toolchain = find_toolchain(self._project)
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._native = allow_native_decide
        self._visible = [str(self._toolchain.prefix), str(self._project), *visible]
        self._visible += [path for path in SYSTEM_LIBRARIES if Path(path).is_dir()]
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="lean")
        try:
            self._isolate = self._can_isolate(unsafe=unsafe)
        except BaseException:
            self.close()
            raise

    @property
    def tier(self) -> str:
        """What Lean runs in, for the log."""
        return f"{self._toolchain.lean} in {'namespaces' if self._isolate else 'unsafe-local'}"

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """Scores in the order of `pairs`; `RewardError` for a problem without a theorem to check."""
        return list(self._threads.map(self._score, pairs))

    def close(self) -> None:
        """Wait for running checks, each of which has a deadline."""
        self._threads.shutdown(cancel_futures=True)

    def _score(self, pair: tuple[Prompt, Completion]) -> Score:
        prompt, completion = pair
        if completion.finish_reason != "stop":
            return _wrong(f"not finished: {completion.finish_reason}")
        forbidden = _FORBIDDEN.search(completion.text) or (not self._native and "native_decide" in completion.text)
        if forbidden:
            return _wrong(f"forbidden: {forbidden[0] if isinstance(forbidden, re.Match) else 'native_decide'}")
        problem = prompt.problem
        theorem = theorem_of(prompt.id, problem)
        source = preamble_of(problem) + problem["prefix"] + completion.text + problem["suffix"]
        source = f"{source.rstrip()}\n\n#print axioms {_ROOT}{theorem}\n"
        try:
            status, output = self._run(source)
        except TimeoutError:
            return _wrong("timeout")
        if status == REFUSED:
            raise RewardError(f"lean cannot be started any more: {output[:300]}; it could when training began")
        allowed = STANDARD_AXIOMS | (NATIVE_AXIOMS if self._native else frozenset())
        detail = judge(output, status, line=source.count("\n"), theorem=theorem, allowed=allowed)
        return _wrong(detail) if detail else Score(1.0, passed=True)

    def _can_isolate(self, *, unsafe: bool) -> bool:
        self._isolate = True
        status, output = self._run("")
        if status == 0:
            return True
        if not unsafe:
            raise SandboxError(
                f"lean cannot be isolated: {output[:300]}; allow unprivileged user namespaces (see docs/sandbox.md) or "
                "accept the risk with --unsafe-local-sandbox"
            )
        return False

    def _run(self, source: str) -> tuple[int, str]:
        """Check one file; status and output. `TimeoutError` after `timeout_s`, with every process of it killed."""
        options = {
            "isolate": self._isolate,
            "visible": self._visible,
            "tmp_mb": 64,
            "output_bytes": OUTPUT_BYTES,
            "folder": str(self._project),
            "argv": [str(self._toolchain.lean), "--stdin", "--json", f"--memory={self._memory_mb}"],
            "env": ENVIRONMENT | {"LEAN_PATH": self._toolchain.search_path},
        }
        code = "import sys; sys.path.insert(0, {!r}); from megatron_sglang.rewards.box.command import main; main({!r})"
        python = [sys.executable, "-P", "-s", "-S", "-B", "-c", code.format(str(PACKAGE.parent), options)]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                python, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env={}, start_new_session=True
            )
            try:
                process.communicate(source.encode(), timeout=self._timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            finally:
                _kill_group(process)
            output.seek(0)
            return process.returncode, output.read(OUTPUT_BYTES).decode(errors="replace")


def judge(output: str, status: int, *, line: int, theorem: str, allowed: frozenset[str]) -> str:
    """Why Lean's `--json` output does not accept the theorem, or "". theorem: its full name. line: that of the command
    which prints its axioms."""
    axioms: list[re.Match[str]] = []
    for row in output.splitlines():
        try:
            message = json.loads(row)
            severity, text, at = message["severity"], message["data"], message["pos"]["line"]
        except (ValueError, KeyError, TypeError):
            return f"lean said: {row[:160]}"
        if severity == "error":
            return f"error at line {at}: {text[:160]}"
        if message.get("kind") == "hasSorry" or re.match(r"declaration uses ['`]sorry", text):
            return "uses sorry"
        if at == line:
            axioms += filter(None, [_AXIOMS.match(text)])
    if status != 0:
        return f"lean ended with status {status}"
    if len(axioms) != 1 or axioms[0]["name"] != theorem:
        return f"the axioms of {theorem} were not printed"
    used = {name.strip() for name in (axioms[0]["axioms"] or "").split(",")} - {""}
    return f"axioms: {', '.join(sorted(used - allowed))}" if used - allowed else ""


def find_toolchain(project: Path) -> Toolchain:
    """The Lean that `lean-toolchain` of the project picks, and its library path; `SetupError` says what to install."""
    lake = any((project / name).exists() for name in ("lakefile.toml", "lakefile.lean"))
    for tool in ("lean", *["lake"] * lake):
        if shutil.which(tool) is None:
            raise SetupError(
                f"fim_lean needs {tool} on PATH and there is none; install elan (github.com/leanprover/elan), then in "
                f"{project}: elan toolchain install $(cat lean-toolchain)" + (" && lake build" if lake else "")
            )
    command = ["lake", "env"] if lake else []
    prefix = Path(_ask([*command, "lean", "--print-prefix"], project))
    search_path = _ask([*command, "printenv", "LEAN_PATH"], project) if lake else ""
    return Toolchain(prefix / "bin" / "lean", prefix, search_path)


def _ask(command: Sequence[str], project: Path) -> str:
    try:
        answer = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=START_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()[-300:]
        raise SetupError(f"{' '.join(command)} fails in {project}: {reason}; make `lake build` work there") from None
    return answer.stdout.strip()


def theorem_of(prompt_id: str, problem: Mapping[str, Any]) -> str:
    """Its full name, without `_root_.`."""
    theorem = problem.get("entry_point") or _declared(preamble_of(problem), problem.get("prefix", ""))
    if not theorem or "suffix" not in problem:
        raise RewardError(f"problem {prompt_id!r} has no prefix, suffix or theorem; expected all three")
    return theorem.removeprefix(_ROOT)


def _declared(preamble: str, prefix: str) -> str:
    """The last theorem that the prefix declares, with the namespaces that are open there; "" if there is none."""
    declared = list(_DECLARATION.finditer(prefix))
    if not declared:
        return ""
    name = declared[-1][1].rstrip(".")  # of its universes, in foo.{u}
    if name.startswith(_ROOT):
        return name
    scopes: list[str] = []
    for kind, given in _SCOPE.findall(preamble + prefix[: declared[-1].start()]):
        parts = given.split(".") if given and kind != "mutual" else [""]
        if kind == "end":
            del scopes[max(0, len(scopes) - len(parts)) :]
        else:
            scopes += parts if kind == "namespace" else [""] * len(parts)
    return ".".join([*filter(None, scopes), name])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wrong(detail: str) -> Score:
    return Score(0.0, passed=False, detail=detail)
