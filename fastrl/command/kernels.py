"""`fastrl kernels audit|check`: tables for people, JSON for programs, exit code 1 for a finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastrl.command.settings import Refused

if TYPE_CHECKING:
    from rich.table import Table

    from fastrl.command.kernel_audit import Audited
    from fastrl.command.kernel_check import Checked

USAGE = """usage: fastrl kernels audit [FILE ...] [--targets sm_90 ...] [--every N] [--json]
       fastrl kernels check [--device cpu|cuda] [--json]

audit  compile every listed configuration of kernels/*.py for every chip, without a GPU; fails on a spill, on more
       shared memory than the chip has, and on what does not compile. --every N takes each N-th configuration.
check  compare value and gradient of every op on every backend of this device with float64."""
WIDTH = 200  # a pipe has no width of its own: enough for the longest row


def run(arguments: Sequence[str]) -> int:
    """Run one of the two commands.

    Returns:
        exit code: 0 nothing found, 1 a finding, or the command cannot run here.

    Raises:
        Refused: wrong arguments.
    """
    match list(arguments):
        case ["audit", *rest] if not {"-h", "--help"} & set(rest):
            return _audit(rest)
        case ["check", *rest] if not {"-h", "--help"} & set(rest):
            return _check(rest)
        case [*_, "-h" | "--help"]:
            print(USAGE)
            return 0
    raise Refused(USAGE)


def _audit(arguments: Sequence[str]) -> int:
    from fastrl.command.kernel_audit import TARGETS, audit

    files, flags = _split(arguments, {"--targets", "--every", "--json"})
    every = flags.get("--every", ["1"])
    if len(every) != 1 or not every[0].isdigit() or int(every[0]) < 1:
        raise Refused(f"--every: expected a whole number of at least 1, got {' '.join(every) or 'nothing'}")
    targets = flags.get("--targets", list(TARGETS))
    try:
        records = audit(files, targets, every=int(every[0]))
    except ValueError as error:
        raise Refused(str(error)) from error
    except RuntimeError as error:
        print(f"kernels audit: {error}", file=sys.stderr)
        return 1
    failed = sum(record.problem is not None for record in records)
    if "--json" in flags:
        print(json.dumps([asdict(record) for record in records], indent=2))
    else:
        _print(_audit_table(records))
        print(f"{len(records)} compilations, {failed} with a problem")
    return 1 if failed else 0


def _check(arguments: Sequence[str]) -> int:
    import torch

    from fastrl.command.kernel_check import check

    files, flags = _split(arguments, {"--device", "--json"})
    (device,) = flags.get("--device", ["cuda" if torch.cuda.is_available() else "cpu"])[:1] or [""]
    if files or device not in ("cpu", "cuda"):
        raise Refused(USAGE)
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no GPU here")
    records = list(check(device))
    failed = sum(record.problem is not None for record in records)
    if "--json" in flags:
        print(json.dumps([asdict(record) for record in records], indent=2))
    else:
        _print(_check_table(records))
        compared = sum(record.cannot_run is None for record in records)
        print(f"{compared} comparisons on {device}, {failed} with a problem")
    return 1 if failed else 0


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
    return words, flags


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def _audit_table(records: Sequence[Audited]) -> Table:
    from rich.table import Table

    table = Table("kernel", "configuration", "target", box=None)
    for column in ("registers", "spills", "stack", "shared", "tensor core"):
        table.add_column(column, justify="right")
    table.add_column("problem", style="red")
    for record in records:
        numbers = (record.registers, record.spills, record.stack, record.shared, record.tensor_core)
        name = f"{record.module}.{record.kernel}"
        table.add_row(name, record.configuration, record.target, *map(str, numbers), record.problem or "")
    return table


def _check_table(records: Sequence[Checked]) -> Table:
    from rich.table import Table

    table = Table("op", "backend", "dtype", "inputs", box=None)
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for record in records:
        if record.cannot_run is not None and "does not exist" in record.cannot_run:
            continue
        numbers = ["-" if x is None else f"{x:.1e}" for x in (record.error, record.allowed)]
        reason = (record.cannot_run or "ok").removeprefix(f"backend {record.backend!r} of {record.op} ")
        said = f"[red]{record.problem}[/red]" if record.problem else f"[dim]{reason}[/dim]"
        table.add_row(record.op, record.backend, record.dtype, record.shapes.replace("[", r"\["), *numbers, said)
    return table
