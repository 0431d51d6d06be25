"""`fastrl kernels list|audit|check`: tables for people, JSON for programs, exit code 1 for a finding.

Needs nothing but torch and triton, so that a machine without network can use it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastrl.command.settings import Refused

if TYPE_CHECKING:
    from fastrl.command.kernel_audit import Audited
    from fastrl.command.kernel_check import Checked

USAGE = """usage: fastrl kernels list [FILE ...] [--targets sm_90 ...] [--json]
       fastrl kernels audit [FILE ...] [--targets sm_90 ...] [--every N] [--rotate] [--json]
       fastrl kernels check [--device cpu|cuda] [--json]

list   every kernel of kernels/*.py, its configurations and the chips it is compiled for.
audit  compile every configuration for every chip, without a GPU; fails on a spill, on more shared memory than the
       chip has, on a 16-bit product without tensor-core instructions, and on what does not compile. --every N takes
       each N-th configuration, --rotate compiles each for one of its chips.
check  compare value and gradient of every op on every backend of this device with float64; time them, and say what
       fraction of that time the bare matrix products take."""

SWITCHES = {"--json", "--rotate"}


def run(arguments: Sequence[str]) -> int:
    """Run one of the three commands.

    Returns:
        exit code: 0 nothing found, 1 a finding, or the command cannot run here.

    Raises:
        Refused: wrong arguments.
    """
    commands: dict[str, Callable[[Sequence[str]], int]] = {"list": _list, "audit": _audit, "check": _check}
    match list(arguments):
        case [name, *rest] if name in commands and not {"-h", "--help"} & set(rest):
            return commands[name](rest)
        case [*_, "-h" | "--help"]:
            print(USAGE)
            return 0
    raise Refused(USAGE)


def _list(arguments: Sequence[str]) -> int:
    from fastrl.command.kernel_audit import listed

    files, flags = _split(arguments, {"--targets", "--json"})
    records = _asked(lambda: listed(files, flags.get("--targets", ())))
    if records is None:
        return 1
    if "--json" in flags:
        print(json.dumps([{key: getattr(x, key) for key in ("kernel", "config", "target")} for x in records], indent=2))
        return 0
    rows = []
    for kernel in dict.fromkeys(record.kernel for record in records):
        mine = [record for record in records if record.kernel == kernel]
        targets = dict.fromkeys(record.target for record in mine)
        rows.append([kernel, str(len({record.config for record in mine})), " ".join(targets)])
    _print(["kernel", "configurations", "chips"], rows, numbers={1})
    return 0


def _audit(arguments: Sequence[str]) -> int:
    from fastrl.command.kernel_audit import audit

    files, flags = _split(arguments, {"--targets", "--every", "--rotate", "--json"})
    every = flags.get("--every", ["1"])
    if len(every) != 1 or not every[0].isdigit() or int(every[0]) < 1:
        raise Refused(f"--every: expected a whole number of at least 1, got {' '.join(every)}")
    rotate = "--rotate" in flags
    records = _asked(lambda: audit(files, flags.get("--targets", ()), every=int(every[0]), rotate=rotate))
    if records is None:
        return 1
    failed = [record for record in records if record.problem]
    if "--json" in flags:
        print(json.dumps([_measurements(record) for record in records], indent=2))
    else:
        header = ["kernel", "config", "target", "registers", "spills", "shared", "stack", "tensor core", "problem"]
        rows = [[*_measurements(record).values(), record.problem or ""] for record in records]
        _print(header, [["-" if x is None else str(x) for x in row] for row in rows], numbers=set(range(3, 8)))
        print(f"{len(records)} compilations, {len(failed)} with a problem")
    for record in failed:
        print(f"{record.kernel} on {record.target}: {record.problem} ({record.config})", file=sys.stderr)
    return 1 if failed else 0


def _measurements(record: Audited) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if key != "problem"}


def _asked(command: Callable[[], list[Audited]]) -> list[Audited] | None:
    """What the command returns; None, and a sentence on stderr, when it cannot run here."""
    try:
        return command()
    except ValueError as error:
        raise Refused(str(error)) from error
    except RuntimeError as error:
        print(f"fastrl kernels: {error}", file=sys.stderr)
        return None


def _check(arguments: Sequence[str]) -> int:
    import torch

    from fastrl.command.kernel_check import check

    files, flags = _split(arguments, {"--device", "--json"})
    devices = flags.get("--device", ["cuda" if torch.cuda.is_available() else "cpu"])
    if files:
        raise Refused(f"check takes no files, got '{files[0]}'")
    if devices not in (["cpu"], ["cuda"]):
        raise Refused(f"--device: expected cpu or cuda, got {' '.join(devices)}")
    (device,) = devices
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no GPU here")
    records = list(check(device))
    failed = sum(record.problem is not None for record in records)
    if "--json" in flags:
        print(json.dumps([asdict(record) for record in records], indent=2))
    else:
        shown = [x for x in records if x.cannot_run is None or "does not exist" not in x.cannot_run]
        header = ["op", "backend", "dtype", "inputs", "error", "allowed", "ms", "of floor", ""]
        _print(header, [_check_row(record) for record in shown], numbers=set(range(4, 8)))
        compared = sum(record.cannot_run is None for record in records)
        print(f"{compared} comparisons on {device}, {failed} with a problem")
    return 1 if failed else 0


def _check_row(record: Checked) -> list[str]:
    errors = ["-" if x is None else f"{x:.1e}" for x in (record.error, record.allowed)]
    times = ["-" if x is None else f"{x:.2f}" for x in (record.milliseconds, record.floor_fraction)]
    reason = (record.cannot_run or "ok").removeprefix(f"backend {record.backend!r} of {record.op} ")
    return [record.op, record.backend, record.dtype, record.shapes, *errors, *times, record.problem or reason]


def _split(arguments: Sequence[str], known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Leading words, and the words after each flag."""
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            if name not in known:
                raise Refused(f"unknown flag '{name}'; there are {', '.join(sorted(known))}")
            words_of_flag = flags.setdefault(name, [])
            if equals:
                words_of_flag.append(value)
        elif flags:
            flags[next(reversed(flags))].append(argument)
        else:
            words.append(argument)
    for name in SWITCHES & set(flags):
        if flags[name]:
            raise Refused(f"{name} takes no value, got '{flags[name][0]}'; files are named before the flags")
    for name, values in flags.items():
        if name not in SWITCHES and not values:
            raise Refused(f"{name}: expected a value")
    return words, flags


def _print(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: set[int]) -> None:
    """A table with two spaces between columns; those of `numbers` are flush right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    for row in (header, *rows):
        cells = [x.rjust(n) if k in numbers else x.ljust(n) for k, (x, n) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
