"""Every verdict, on submissions a reader can judge."""

from __future__ import annotations

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastrl.rewards.sandbox import CallTest, Limits, Sandbox, ScriptTest, Status, StdinTest, Test, grade_in

QUICK = Limits(seconds=2.0, memory_mib=256)
DOUBLE = CallTest("double", (21,), 42)


def verdict(sandbox: Sandbox, source: str, test: Test, **limits: float) -> Status:
    return grade_in(sandbox, source, [test], limits=Limits(**{"seconds": 2.0, **limits})).status  # type: ignore[arg-type]


def test_functions_get_every_verdict(sandbox: Sandbox) -> None:
    sources = {
        "def double(x):\n    return 2 * x": Status.PASS,
        "double = lambda x: x + x": Status.PASS,
        "def double(x):\n    return 2.0 * x": Status.WRONG,
        "def double(x):\n    return 1 / 0": Status.RUNTIME,
        "def triple(x):\n    return 3 * x": Status.RUNTIME,
        "def double(x):\n    return object()": Status.OUTPUT,
        "def double(x):\n    raise MemoryError": Status.MEMORY,
        "def double(x)": Status.COMPILE,
        "def double(x):\n    return '\0'": Status.COMPILE,
    }
    assert {source: verdict(sandbox, source, DOUBLE) for source in sources} == sources
    assert verdict(sandbox, "def double(x):\n    while True: pass", DOUBLE, seconds=0.2) is Status.TIMEOUT
    assert verdict(sandbox, "def double(x):\n    while True: pass", DOUBLE, cpu_seconds=1) is Status.TIMEOUT


def test_programs_read_stdin_and_are_judged_by_what_they_print(sandbox: Sandbox) -> None:
    test = StdinTest("3\n1 2 3\n", "sum\n6\n")
    program = "n = int(input())\nprint('sum')\nprint(sum(map(int, input().split()))){}"
    assert verdict(sandbox, program.format(""), test) is Status.PASS
    assert verdict(sandbox, program.format("\nprint('  ')"), test) is Status.PASS
    assert verdict(sandbox, program.format("\nprint(7)"), test) is Status.WRONG
    assert verdict(sandbox, program.format("\nraise SystemExit(1)"), test) is Status.RUNTIME
    large = StdinTest("x" * 3_000_000, "3000000")
    assert verdict(sandbox, "import sys\nprint(len(sys.stdin.read()))", large) is Status.PASS
    assert verdict(sandbox, "print(3000000)", large) is Status.PASS  # nobody has to read


def test_methods_types_and_tolerances(sandbox: Sandbox) -> None:
    source = "class Solution:\n    def halves(self, xs):\n        return [x / 3 for x in reversed(xs)]"
    third = 0.3333333333
    test = CallTest("Solution.halves", ([1, 2],), [third, 2 * third], tolerance=1e-6, is_unordered=True)
    assert verdict(sandbox, source, test) is Status.PASS
    assert verdict(sandbox, source, CallTest("Solution.halves", ([1, 2],), [third, 2 * third])) is Status.WRONG
    pairs = CallTest("f", ({1, 2}, (3,), {"k": b"v"}), ({1, 2}, (3,), {"k": b"v"}))
    assert verdict(sandbox, "def f(*a):\n    return a", pairs) is Status.PASS


def test_a_script_may_compare_as_it_likes_and_expect_exceptions(sandbox: Sandbox) -> None:
    script = """
def near(a, b):
    return abs(a - b) < 1e-6
def check(f):
    assert near(f(4.0), 2) and f(x=9.0) == 3
    try:
        f(-1.0)
    except ValueError:
        pass
    else:
        assert False, "no exception"
"""
    test = ScriptTest("root", script)
    assert verdict(sandbox, "from math import sqrt as root_\ndef root(x): return root_(x)", test) is Status.PASS
    assert verdict(sandbox, "def root(x): return x ** 0.5", test) is Status.WRONG  # a complex number
    assert verdict(sandbox, "def root(x): return None", test) is Status.WRONG
    assert verdict(sandbox, "def root(x): raise KeyError", test) is Status.RUNTIME
    assert verdict(sandbox, "def root(x)", test) is Status.COMPILE
    assert verdict(sandbox, "raise ValueError", test) is Status.RUNTIME


def test_an_exception_cannot_end_the_script_s_own_loop_early(sandbox: Sandbox) -> None:
    test = ScriptTest("double", "assert all(map(lambda x: double(x) == 2 * x, range(3)))")
    assert verdict(sandbox, "def double(x): return 2 * x", test) is Status.PASS
    assert verdict(sandbox, "def double(x): raise StopIteration", test) is Status.RUNTIME


def test_a_submission_cannot_stand_in_for_the_script_s_own_helpers(sandbox: Sandbox) -> None:
    script = "def near(a, b):\n    return a == b\nassert near(double(2), 4)"
    assert (
        verdict(sandbox, "def near(a, b): return True\ndef double(x): return 0", ScriptTest("double", script))
        == "WRONG"
    )


def test_a_test_that_is_itself_broken_is_no_verdict_on_the_submission(sandbox: Sandbox) -> None:
    good = "def double(x): return 2 * x"
    for script in ("pass", "def check(f):\n    pass", "import os\nos._exit(0)", "double(lambda: 1)", "syntax error"):
        assert verdict(sandbox, good, ScriptTest("double", script)) is Status.INFRA, script


def test_counts_and_the_first_failure(sandbox: Sandbox) -> None:
    tests = [CallTest("f", (n,), n % 2 == 0) for n in range(4)]
    result = grade_in(sandbox, "def f(n): return True", tests, limits=QUICK)
    assert (result.passed, result.n_passed, result.n_tests, result.status) == (False, 2, 4, Status.WRONG)
    result = grade_in(sandbox, "def f(n): return n % 2 == 0", tests, limits=QUICK)
    assert (result.passed, result.n_passed, result.n_tests, result.status) == (True, 4, 4, Status.PASS)
    result = grade_in(sandbox, "def f(n)", tests, limits=QUICK)
    assert (result.n_passed, result.status) == (0, Status.COMPILE)


def test_honest_threads_processes_files_and_subprocesses_work(sandbox: Sandbox) -> None:
    source = """
import asyncio, multiprocessing, subprocess, tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
@dataclass
class Item:
    value: int
def square(x):
    return x * x
def f(n):
    with ThreadPoolExecutor(8) as pool, multiprocessing.get_context("fork").Pool(2) as processes:
        threads = sum(pool.map(square, range(n)))
        forked = sum(processes.map(square, range(n)))
    with tempfile.TemporaryFile("w+") as file:
        file.write(str(forked))
        file.seek(0)
        read = int(file.read())
    echoed = int(subprocess.run(["echo", str(threads)], capture_output=True, text=True).stdout)
    async def last():
        await asyncio.sleep(0)
        return Item(read).value
    return [threads, echoed, asyncio.run(last())]
"""
    result = grade_in(sandbox, source, [CallTest("f", (10,), [285, 285, 285])])
    assert result.passed, result


def test_missing_answers_and_missing_tests_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="stdout is empty"):
        StdinTest("1", " \n")
    with pytest.raises(ValueError, match="is None"):
        CallTest("f", (), None)
    with pytest.raises(ValueError, match="tolerance"):
        CallTest("f", (), 1, tolerance=float("nan"))
    with pytest.raises(ValueError, match="tests is empty"):
        grade_in(sandbox, "", [])
    with pytest.raises(ValueError, match="no plain value"):
        grade_in(sandbox, "", [CallTest("f", (object(),), 1)])
    with pytest.raises(ValueError, match="seconds must be positive"):
        Limits(seconds=0)


def human_eval(shared_data: Path) -> list[dict[str, Any]]:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def passes(sandbox: Sandbox, row: dict[str, Any], body: str) -> Status:
    test = ScriptTest(row["entry_point"], row["prompt"] + row["test"])
    return grade_in(sandbox, row["prompt"] + body, [test]).status


def test_a_tenth_of_human_eval(sandbox: Sandbox, shared_data: Path) -> None:
    rows = human_eval(shared_data)[::16]
    assert {passes(sandbox, row, row["canonical_solution"]) for row in rows} == {Status.PASS}
    assert {passes(sandbox, row, "    pass\n") for row in rows} == {Status.WRONG}


@pytest.mark.slow
def test_all_of_human_eval_right_and_wrong(sandbox: Sandbox, shared_data: Path) -> None:
    rows = human_eval(shared_data)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        right = list(threads.map(lambda row: passes(sandbox, row, row["canonical_solution"]), rows))
        wrong = list(threads.map(lambda row: passes(sandbox, row, "    pass\n"), rows))
    print(f"{2 * len(rows) / (time.monotonic() - started):.1f} gradings/s")
    assert len(rows) == 164
    assert set(right) == {Status.PASS}
    assert set(wrong) == {Status.WRONG}
