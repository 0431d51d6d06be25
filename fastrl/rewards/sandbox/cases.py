"""What the sandbox is asked and what it answers: test cases, limits, verdicts. Records only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The verdict on one submission."""

    PASS = "PASS"
    WRONG = "WRONG"  # it ran and its output is not the expected one
    RUNTIME = "RUNTIME"  # it raised, exited or crashed
    TIMEOUT = "TIMEOUT"  # wall clock or CPU time
    MEMORY = "MEMORY"
    OUTPUT = "OUTPUT"  # it wrote more than allowed, or a value that is no plain data
    COMPILE = "COMPILE"
    INFRA = "INFRA"  # the sandbox or the test itself failed: never a reward


@dataclass(frozen=True, slots=True)
class Limits:
    """What one test case may use.

    Attributes:
        seconds: wall clock, counted from the moment the submission could start.
        cpu_seconds: CPU time of any one process.
        memory_mib: memory of all its processes together; looked at ten times a second, so a burst overshoots.
        address_space_mib: address space of any one process; honest thread pools need 2 GiB and more.
        output_kib: bytes it may write on stdout, stderr and as values, together.
        processes: processes and threads at one time.
        file_mib: size of one file, and of each of /tmp and /dev/shm.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mib: int = 1024
    address_space_mib: int = 4096
    output_kib: int = 1024
    processes: int = 64
    file_mib: int = 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class StdinTest:
    """The submission is a program: it reads `stdin` and must print `stdout`.

    Compared line by line; spaces at line ends and empty lines at the end do not count.
    """

    stdin: str
    stdout: str

    def __post_init__(self) -> None:
        if not self.stdout.strip():
            raise ValueError("stdout is empty: an empty program would pass; remove this test or give what it prints")


@dataclass(frozen=True, slots=True)
class CallTest:
    """`entry_point(*args)` must return `expected`: same types, same values.

    Attributes:
        entry_point: a function's name, or `Class.method`, called on a fresh `Class()`.
        args: positional arguments: None, bool, int, float, complex, str, bytes and list, tuple, set, dict of them.
        expected: of the same kinds, and not None.
        tolerance: floats may differ by this much, absolute or relative to the expected one; 0 is exact.
        is_unordered: a list or tuple at the top may come in any order.
    """

    entry_point: str
    args: tuple[object, ...]
    expected: object
    tolerance: float = 0.0
    is_unordered: bool = False

    def __post_init__(self) -> None:
        if self.expected is None:
            raise ValueError(
                f"the expected value of {self.entry_point}{self.args!r} is None: a missing answer lets an empty "
                "function pass; remove this test, or write a ScriptTest if None is the answer"
            )
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be finite and at least 0, got {self.tolerance}")


@dataclass(frozen=True, slots=True)
class ScriptTest:
    """A script of asserts about the function `entry_point`; it must call it at least once.

    The script runs in a process of its own, with a stand-in for the function that sends arguments out and brings plain
    values back. Its other names must be its own: for HumanEval, put the row's `prompt` before its `test`. If it
    defines `check`, `check(function)` is called. Arguments travel by value, so changes made in place are not seen.
    """

    entry_point: str
    script: str


Test = StdinTest | CallTest | ScriptTest


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on a submission.

    Attributes:
        passed: every test passed.
        n_passed: how many passed. Tests after a TIMEOUT, MEMORY, COMPILE or INFRA verdict are not run.
        n_tests: how many there are.
        status: PASS, or the first other verdict; INFRA wins over all, as it says that nothing was measured.
        seconds: wall clock of the whole grading.
        detail: one line about `status`; never shown to the submission.
    """

    passed: bool
    n_passed: int
    n_tests: int
    status: Status
    seconds: float
    detail: str = ""
