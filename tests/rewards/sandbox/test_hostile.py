"""Hostile submissions: none passes, none escapes, none leaves a process behind, each gets its verdict in time."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastrl.rewards.sandbox import CallTest, Grade, Limits, Sandbox, ScriptTest, Status, StdinTest, Test, grade_in
from fastrl.rewards.sandbox import sandbox as module
from fastrl.rewards.sandbox.layers import Layers

ProcessesBelow = Callable[[list[int]], list[int]]
CORPUS = Path(__file__).parent / "corpus"
LIMITS = Limits(seconds=1.5, cpu_seconds=2, memory_mib=256, address_space_mib=1024, output_kib=128, file_mib=8)
SECONDS = 4 * LIMITS.seconds  # for one grading of up to two tests, on a busy machine
FUNCTION_TESTS: dict[str, list[Test]] = {
    "calls": [CallTest("mix", (3, 5), 3 * 1009 + 5 * 31), CallTest("mix", (7, 2), 7 * 1009 + 2 * 31)],
    "script": [ScriptTest("mix", "def check(candidate):\n    assert candidate(3, 5) == 3182\n")],
}
PROGRAM_TESTS: dict[str, list[Test]] = {"stdin": [StdinTest("3 5\n", "3182\n")]}
QUICK = {
    "forged verdict on every descriptor",
    "forged outcome of a slot on every descriptor",
    "lying equality",
    "an exception that stops iteration",
    "the encoder patched",
    "os._exit in the call",
    "own memory searched for the check's script",
    "every process id killed",
    "a daemon that ignores signals",
    "a memory bomb",
    "a gigabyte of output",
    "a connection to the network",
    "the core pattern",
    "answers remembered for the next test",
    "a child that writes after its parent",
    "the right answer and a crash",
}
HONEST = "def mix(a, b):\n    return a * 1009 + b * 31\n"


def corpus() -> list[tuple[str, str, str, str]]:
    """(name, kind of test, expected status or "", source) of every submission under every kind of test."""
    found = []
    for file, kinds in (("functions", FUNCTION_TESTS), ("programs", PROGRAM_TESTS)):
        sections = re.split(r"^### ", (CORPUS / f"{file}.txt").read_text(), flags=re.MULTILINE)[1:]
        for section in sections:
            head, _, source = section.partition("\n")
            name, _, status = head.partition(" -> ")
            found += [(name, kind, status, source) for kind in kinds]
    return found


CASES = corpus()


@pytest.fixture(scope="module")
def weak_sandbox(weak_layers: Layers) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "found_layers", lambda python: weak_layers)
        made = Sandbox(slots=2, strict=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def canary_port() -> Iterator[int]:
    """A server on the host that nobody may reach."""
    visits: list[object] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            visits.append(address)
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    before = host()
    port = server.getsockname()[1]
    yield port
    socket.create_connection(("127.0.0.1", port)).close()  # the server does count visits
    deadline = time.monotonic() + 5
    while not visits and time.monotonic() < deadline:
        time.sleep(0.01)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)
    assert len(visits) == 1
    assert host() == before


def host() -> list[object]:
    """What a submission that escaped would have changed."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    escaped = [path.name for folder in ("/tmp", "/usr", "/dev/shm") for path in Path(folder).glob("*escaped*")]
    return [os.uname().nodename, pattern, escaped, os.stat("/usr/bin/python3").st_mtime]


def graded(sandbox: Sandbox, kind: str, source: str, port: int) -> Grade:
    tests = (FUNCTION_TESTS | PROGRAM_TESTS)[kind]
    return grade_in(sandbox, source.replace("CANARY_PORT", str(port)), tests, limits=LIMITS)


def judge(sandbox: Sandbox, processes_below: ProcessesBelow, case: tuple[str, str, str, str], port: int) -> None:
    name, kind, status, source = case
    result = graded(sandbox, kind, source, port)
    assert result.n_passed == 0, f"{name}: {result}"
    assert result.status is not Status.INFRA, f"{name}: {result}"
    assert not status or result.status == status, f"{name}: {result}"
    assert result.seconds < SECONDS, f"{name}: {result}"
    # The slots adopt whatever loses its parent, so nothing left behind can be anywhere else.
    slots = [slot.process.pid for slot in sandbox._all.values()]
    assert processes_below(slots) == [], name


def test_the_corpus_has_more_than_a_hundred_hostile_submissions() -> None:
    names = [name for name, kind, _, _ in CASES if kind != "script"]
    assert len(names) >= 150
    assert set(names) >= QUICK


@pytest.mark.parametrize("case", [c for c in CASES if c[0] in QUICK], ids=lambda case: f"{case[0]} [{case[1]}]")
def test_a_hostile_submission_gains_nothing(
    sandbox: Sandbox, processes_below: ProcessesBelow, canary_port: int, case: tuple[str, str, str, str]
) -> None:
    judge(sandbox, processes_below, case, canary_port)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} [{case[1]}]")
def test_without_bubblewrap_none_passes_either(
    weak_sandbox: Sandbox, processes_below: ProcessesBelow, canary_port: int, case: tuple[str, str, str, str]
) -> None:
    judge(weak_sandbox, processes_below, (case[0], case[1], "", case[3]), canary_port)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in QUICK], ids=lambda case: f"{case[0]} [{case[1]}]")
def test_no_hostile_submission_gains_anything(
    sandbox: Sandbox, processes_below: ProcessesBelow, canary_port: int, case: tuple[str, str, str, str]
) -> None:
    judge(sandbox, processes_below, case, canary_port)


def test_honest_submissions_pass_beside_hostile_ones(sandbox: Sandbox, canary_port: int) -> None:
    for kind in ("calls", "script"):
        assert graded(sandbox, kind, HONEST, canary_port).passed
    program = "a, b = map(int, input().split())\nprint(a * 1009 + b * 31)"
    assert graded(sandbox, "stdin", program, canary_port).passed
