"""The filter program says what the table says, for each architecture; checked by interpreting it."""

from __future__ import annotations

import struct

import pytest

from fastrl.rewards.sandbox.seccomp import ARCHITECTURES, CLONE, CLONE3, MMAP, REFUSED, SOCKETPAIR, filter_program

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def verdict(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would do with a call: a plain interpreter of the few instructions in use."""
    found = ARCHITECTURES[machine][1] if architecture is None else architecture
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, found, 0, *values)
    program = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    at, accumulator = 0, 0
    while True:
        code, when_true, when_false, k = program[at]
        at += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif code == 0x54:
            accumulator &= k
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += when_true if holds else when_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_refused_calls_end_in_eperm_and_others_pass(machine: str) -> None:
    column = ARCHITECTURES[machine][0]
    refused = {numbers[column] for numbers in REFUSED.values()} - {None}
    special = {CLONE[column], CLONE3[column], SOCKETPAIR[column], MMAP[column]}
    for number in range(512):
        if number not in special:
            assert verdict(machine, number) == (EPERM if number in refused else ALLOW), number


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_arguments_decide_for_clone_socketpair_and_mmap(machine: str) -> None:
    column = ARCHITECTURES[machine][0]
    fork, thread, new_user, new_network = 0x01200011, 0x003D0F00, 0x10000000, 0x40000000
    assert verdict(machine, CLONE[column], fork) == verdict(machine, CLONE[column], thread) == ALLOW
    assert verdict(machine, CLONE[column], fork | new_user) == EPERM
    assert verdict(machine, CLONE[column], new_network) == EPERM
    assert verdict(machine, CLONE3[column]) == ENOSYS
    assert verdict(machine, SOCKETPAIR[column], 1) == ALLOW
    assert verdict(machine, SOCKETPAIR[column], 2) == EPERM
    private, shared, anonymous = 0x02, 0x01, 0x20
    assert verdict(machine, MMAP[column], 0, 4096, 3, private | anonymous) == ALLOW
    assert verdict(machine, MMAP[column], 0, 4096, 3, shared) == ALLOW
    assert verdict(machine, MMAP[column], 0, 4096, 3, shared | anonymous) == EPERM


def test_foreign_architectures_are_killed() -> None:
    i386, x32 = 0x40000003, 0x40000000
    assert verdict("x86_64", 39, architecture=i386) == KILL
    assert verdict("x86_64", x32 + 39) == KILL
    assert verdict("aarch64", 172, architecture=0x40000028) == KILL


def test_a_machine_without_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="no seccomp filter for the machine 'riscv64'"):
        filter_program("riscv64")
