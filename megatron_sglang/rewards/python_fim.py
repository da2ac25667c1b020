"""Scores a hole filled in Python: the completed source must pass the problem's tests, in a sandbox.

Problem: {"prefix", "suffix", "entry_point", "tests", "pure", optional "preamble"}; the source is preamble + prefix +
completion + suffix, and the preamble also comes before the tests. Tests: see `sandbox.Job`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from megatron_sglang.errors import RewardError
from megatron_sglang.prompts.schema import preamble_of
from megatron_sglang.rewards.sandbox import Job, Sandbox, Verdict
from megatron_sglang.types import Completion, Prompt, Score

CACHE_SIZE = 1 << 16


class PythonFim:
    """`Score.value` is the share of tests passed, or with `binary` 1.0 for all and 0.0 otherwise.

    With `require_stop` an answer that did not end by itself scores 0 unseen. Equal answers to a problem are judged
    once; two data sets may have other tests under the same id. Owns `sandbox`.
    """

    def __init__(self, sandbox: Sandbox, *, binary: bool = False, require_stop: bool = True) -> None:
        self._sandbox = sandbox
        self._binary = binary
        self._require_stop = require_stop
        self._cache: dict[tuple[str, bytes], Score] = {}

    @property
    def tier(self) -> str:
        """What the sandbox is, for the log."""
        return self._sandbox.description

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        """Scores in the order of `pairs`; `RewardError` if a problem itself is unusable."""
        jobs = [self._job(prompt, completion.text) for prompt, completion in pairs]
        keys = [(prompt.id, _digest(job)) for (prompt, _), job in zip(pairs, jobs, strict=True)]
        finished = [completion.finish_reason == "stop" or not self._require_stop for _, completion in pairs]
        new = {key: job for key, job, ok in zip(keys, jobs, finished, strict=True) if ok and key not in self._cache}
        verdicts = dict(zip(new, self._sandbox.run(list(new.values())), strict=True))
        known = self._cache | {key: self._score(key[0], verdict) for key, verdict in verdicts.items()}
        # A timeout may be the machine's fault: it is looked at again the next time.
        self._cache = {key: score for key, score in known.items() if key not in verdicts or not verdicts[key].late}
        if len(self._cache) > CACHE_SIZE:
            self._cache.clear()
        return [
            known[key] if ok else Score(0.0, passed=False, detail=f"not finished: {completion.finish_reason}")
            for key, ok, (_, completion) in zip(keys, finished, pairs, strict=True)
        ]

    def close(self) -> None:
        """End the sandbox."""
        self._sandbox.close()

    def _job(self, prompt: Prompt, text: str) -> Job:
        problem = prompt.problem
        try:
            preamble = preamble_of(problem)
            source = preamble + problem["prefix"] + text + problem["suffix"]
            job = Job(source, problem["entry_point"], problem["tests"], preamble)
            for test in job.tests:
                _ = isinstance(test, str) or (test["args"], test["expect"])
        except (KeyError, TypeError) as error:
            raise RewardError(
                f"problem {prompt.id!r} has no usable field {error}; expected prefix, suffix, entry_point and tests"
            ) from None
        if not job.tests:
            raise RewardError(f"problem {prompt.id!r} has no tests; it cannot be scored, remove it from the data set")
        if self._sandbox.tier == "restricted" and not problem.get("pure", False):
            raise RewardError(
                f"problem {prompt.id!r} is not declared pure, and the sandbox tier 'restricted' runs pure ones only; "
                "use a machine with bubblewrap or user namespaces"
            )
        return job

    def _score(self, prompt_id: str, verdict: Verdict) -> Score:
        if verdict.broken:
            raise RewardError(f"tests of problem {prompt_id!r} cannot be run: {verdict.broken}; correct the data set")
        passed = all(verdict.passed)
        share = sum(verdict.passed) / len(verdict.passed)
        return Score(float(passed) if self._binary else share, passed, verdict.detail)


def _digest(job: Job) -> bytes:
    text = json.dumps([job.source, job.entry_point, job.tests, job.preamble], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
