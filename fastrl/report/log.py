"""What a run writes down: JSON-lines files that survive a kill and can be cut back to a checkpoint.

A run directory holds `metrics.jsonl` (one line per logged step, TRL's metric names), `completions.jsonl` (samples),
`errors.jsonl` (failures of rewards), `signals.jsonl` (detectors that fired), `run.json` (the configuration),
`environment.json`, and what the checkpoints need.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrl.rewards import RewardError

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
ERRORS_FILE = "errors.jsonl"
SIGNALS_FILE = "signals.jsonl"
CONFIG_FILE = "run.json"
ENVIRONMENT_FILE = "environment.json"


class JsonLines:
    """An append-only file with one JSON object per line. Owns the open file.

    Every line reaches the operating system in one write, so that a killed process leaves at most one torn line, the
    last. Opening the file again removes it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        whole = _whole_lines(self.path)
        if whole < self._file.tell():
            self._file.truncate(whole)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line. Non-finite floats are refused with ValueError: JSON has none."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    @property
    def offset(self) -> int:
        """Length of the file in bytes, for a checkpoint. What it counts is on the disk when it returns."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def truncate_to(self, offset: int) -> None:
        """Forget every line after `offset`, so that a resumed run writes them again.

        Raises:
            ValueError: the file is shorter, or the offset is not the end of a line.
        """
        size = os.fstat(self._file.fileno()).st_size
        if not 0 <= offset <= size:
            raise ValueError(f"{self.path} has {size} bytes, but the checkpoint was taken at {offset}: lines are lost")
        if offset and _byte_before(self.path, offset) != b"\n":
            raise ValueError(f"{self.path}: no line ends at byte {offset}; the file is not the checkpoint's")
        self._file.truncate(offset)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLog:
    """`metrics.jsonl`: one line `{"step", "time", **metrics}` per logged step.

    Attributes:
        nonfinite: values written as null so far because they were NaN or infinite.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self._lines = JsonLines(path)
        self._clock = clock
        self.nonfinite = 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step. NaN and infinities become null, and the line's `nonfinite` says how many did.

        Raises:
            ValueError: a metric is not a number (a tensor needs `.item()`), or is called step, time or nonfinite.
        """
        record: dict[str, float | None] = {"step": step, "time": round(self._clock(), 3)}
        for name, value in metrics.items():
            if name in ("step", "time", "nonfinite"):
                raise ValueError(f"a metric cannot be called {name!r}: every line of the log has its own")
            record[name] = _plain(name, value)
        lost = sum(value is None for value in record.values())
        if lost:
            record["nonfinite"] = lost
            self.nonfinite += lost
        self._lines.append(record)

    @property
    def offset(self) -> int:
        """See `JsonLines.offset`."""
        return self._lines.offset

    def truncate_to(self, offset: int) -> None:
        """See `JsonLines.truncate_to`."""
        self._lines.truncate_to(offset)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._lines.close()


def log_errors(lines: JsonLines, step: int, errors: Mapping[str, RewardError]) -> None:
    """Append the failures of a step's rewards to `errors.jsonl`: `{"step", "reward", "count", "message"}` each."""
    for name, error in errors.items():
        lines.append({"step": step, "reward": name, "count": error.count, "message": error.first})


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Every whole line of a JSON-lines file, in order; a torn last line is left out.

    Raises:
        ValueError: a line is not a JSON object.
    """
    data = Path(path).read_bytes()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} must hold a JSON object, got {type(record).__name__}")
        records.append(record)
    return records


def _plain(name: str, value: object) -> float | None:
    """A number as Python's own int or float; None when it is not finite."""
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__}")
    number = float(value)
    return number if math.isfinite(number) else None


def _byte_before(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset - 1)
        return file.read(1)


def _whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
