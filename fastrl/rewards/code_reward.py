"""1 when the code in a completion passes its row's tests, run in the sandbox."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

from fastrl.rewards.protocol import promises
from fastrl.rewards.sandbox import CallTest, Limits, ScriptTest, Status, StdinTest, Test, default_sandbox, grade_in
from fastrl.rewards.text import completion_text, final_answer

_KINDS: tuple[type[StdinTest] | type[CallTest] | type[ScriptTest], ...] = (StdinTest, CallTest, ScriptTest)
_FENCED = re.compile(r"^[ \t]*```[ \t]*(?:python|python3|py)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


# In this process: the sandbox is a pool of killable processes itself, with limits of its own.
@promises(in_process=True, per_item=True)
@dataclass(frozen=True)
class CodeReward:
    """A reward that grades the last fenced code block of each completion.

    Attributes:
        seconds, memory_mib: limits of each test; see `Limits`.
        partial: give the share of tests passed instead of 1 for all and 0 otherwise. Tests behind a time-out, or
            behind more memory than allowed, count as failed.
        strict: refuse unless every layer of the sandbox holds.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    partial: bool = False
    strict: bool = True

    @property
    def __name__(self) -> str:
        return "code"

    def __call__(
        self, completions: Sequence[object], tests: Sequence[object], **_: object
    ) -> list[float | RuntimeError]:
        """[S] completions and their tests -> [S] values in [0, 1]; an exception where the sandbox failed.

        Args:
            completions: [S] strings or message lists; without a closed code block the value is 0.
            tests: [S] lists of tests, or such lists as JSON; see `parsed_tests`.
        """
        sandbox = default_sandbox(strict=self.strict)
        limits = Limits(seconds=self.seconds, memory_mib=self.memory_mib)

        def value(completion: object, raw: object) -> float | RuntimeError:
            cases = parsed_tests(raw)
            source = last_code_block(completion_text(completion))
            if source is None:
                return 0.0
            result = grade_in(sandbox, source, cases, limits=limits)
            if result.status is Status.INFRA:
                return RuntimeError(f"the sandbox gave no verdict: {result.detail}")
            return result.n_passed / result.n_tests if self.partial else float(result.passed)

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
            return list(threads.map(value, completions, tests))

    def check(self, tests: object) -> None:
        """Refuse a row's tests, or this machine, before training.

        Raises:
            ValueError: see `parsed_tests`.
            RuntimeError: there is no sandbox.
        """
        default_sandbox(strict=self.strict)
        parsed_tests(tests)


code_reward = CodeReward()


def last_code_block(text: str) -> str | None:
    """What stands in the last closed ```-fence, of Python or of no language, behind the reasoning; None without one."""
    answer = final_answer(text)
    blocks = _FENCED.findall((answer or "") + "\n")
    return blocks[-1] if blocks else None


def parsed_tests(raw: object) -> list[Test]:
    """The tests of one row.

    Args:
        raw: a list, or a list as JSON, of objects with the fields of StdinTest, CallTest or ScriptTest:
            `{"stdin", "stdout"}`, `{"entry_point", "args", "expected"}`, `{"entry_point", "script"}`.

    Raises:
        ValueError: it is none, is empty, or an answer is missing.
    """
    rows = _json(raw) if isinstance(raw, str) else raw
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"tests must be a list of at least one object, got {raw!r:.80}")
    return [_parsed_test(row) for row in rows]


def _parsed_test(row: Mapping[str, Any]) -> Test:
    given = {name: value for name, value in row.items() if value is not None or name == "expected"}
    for kind in _KINDS:
        known = {field.name for field in fields(kind)}
        needed = {field.name for field in fields(kind) if field.name not in ("tolerance", "is_unordered")}
        if needed <= given.keys() <= known:
            values: dict[str, Any] = {name: tuple(value) if name == "args" else value for name, value in given.items()}
            return kind(**values)
    raise ValueError(
        f"a test has the keys {', '.join(map(str, row))}; it needs stdin and stdout, or entry_point, args and expected "
        "(and perhaps tolerance, is_unordered), or entry_point and script"
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"tests are no JSON: {error}") from error
