"""The verdict on a submission: only inputs enter the sandbox, outputs leave it, and are compared here."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from threading import Lock
from typing import Any

from fastrl.rewards.sandbox.cases import CallTest, Grade, Limits, ScriptTest, Status, StdinTest, Test
from fastrl.rewards.sandbox.sandbox import Sandbox
from fastrl.rewards.sandbox.values import encode, same, sorted_tree

LOG = logging.getLogger(__name__)
# After one of these the next test would meet the same, at the same cost.
_LAST = {Status.TIMEOUT, Status.MEMORY, Status.COMPILE, Status.INFRA}
_defaults: dict[tuple[int, bool], Sandbox] = {}
_defaults_lock = Lock()


def grade(source: str, tests: Sequence[Test], *, limits: Limits = Limits(), strict: bool = True) -> Grade:  # noqa: B008
    """Run a submission on every test, each in a fresh sandboxed process.

    Args:
        source: Python code of any origin.
        tests: at least one.
        limits: for each test.
        strict: refuse unless every layer of the sandbox holds; see `Sandbox`.

    Returns:
        The verdict. A faulty sandbox gives INFRA, and no exception, once it has worked.

    Raises:
        RuntimeError: there is no sandbox on this machine; the message says what to install.
        ValueError: no tests, or an argument that is no plain value.

    Cost: 30 ms for a test, 60 ms for a ScriptTest, on one core.
    """
    return grade_in(default_sandbox(strict=strict), source, tests, limits=limits)


def grade_in(sandbox: Sandbox, source: str, tests: Sequence[Test], *, limits: Limits = Limits()) -> Grade:  # noqa: B008
    """`grade` in a sandbox of one's own."""
    if not isinstance(source, str):
        raise ValueError(f"source must be a string, got {type(source).__name__}")
    if not tests:
        raise ValueError("tests is empty: without a test every submission would pass")
    jobs = [_job(source, test, limits) for test in tests]
    started = time.monotonic()
    verdicts: list[tuple[Status, str]] = []
    for job, test in zip(jobs, tests, strict=True):
        verdicts.append(_verdict(sandbox.run(job), test))
        if verdicts[-1][0] in _LAST:
            break
    failed = [verdict for verdict in verdicts if verdict[0] is not Status.PASS]
    infra = [verdict for verdict in failed if verdict[0] is Status.INFRA]
    status, detail = (infra or failed or [(Status.PASS, "")])[0]
    n_passed = len(verdicts) - len(failed)
    result = Grade(status is Status.PASS, n_passed, len(tests), status, time.monotonic() - started, detail)
    if sandbox.missing:
        LOG.warning("graded %s without %s: weaker than promised", status, ", ".join(sandbox.missing))
    return result


def default_sandbox(*, strict: bool = True) -> Sandbox:
    """The process's own sandbox, made at the first call. Call it before secrets or a GPU are at hand.

    Raises:
        RuntimeError: as `Sandbox`.
    """
    with _defaults_lock:
        key = (os.getpid(), strict)  # a forked child must not talk to its parent's slots
        if key not in _defaults:
            _defaults[key] = Sandbox(strict=strict)
        return _defaults[key]


def _job(source: str, test: Test, limits: Limits) -> dict[str, Any]:
    job: dict[str, Any] = {"source": source, "stdin": "", "limits": asdict(limits)}
    if isinstance(test, StdinTest):
        return {**job, "role": "program", "stdin": test.stdin}
    if isinstance(test, ScriptTest):
        return {**job, "role": "script", "script": test.script, "entry_point": test.entry_point}
    encode(test.expected)
    return {**job, "role": "function", "call": ["call", test.entry_point, encode(list(test.args)), encode({})]}


def _verdict(outcome: dict[str, Any], test: Test) -> tuple[Status, str]:
    if outcome["status"] != "DONE":
        return Status(outcome["status"]), outcome["detail"]
    if isinstance(test, StdinTest):
        is_right = _lines(outcome["stdout"]) == _lines(test.stdout)
        return (Status.PASS, "") if is_right else (Status.WRONG, f"printed {outcome['stdout']!r:.200}")
    assert isinstance(test, CallTest)
    expected, got = encode(test.expected), outcome["value"]
    try:
        if test.is_unordered:
            expected, got = sorted_tree(expected), sorted_tree(got)
        is_right = same(expected, got, tolerance=test.tolerance)
    except (TypeError, ValueError, RecursionError) as error:
        return Status.OUTPUT, f"returned no value's tree: {error}"
    return (Status.PASS, "") if is_right else (Status.WRONG, f"returned {got!r:.200}")


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
