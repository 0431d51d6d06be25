"""A file of JSON lines that is there whole or not at all, and whose writer may be killed and go on.

    .NAME.partial    a header that says what makes it, then rows; after each batch a mark {"done", "counts"}
    NAME             the rows alone, once all are there

What follows the last mark is half of a batch and is cut away; a batch is made alike the second time. The unfinished
file is locked while it is open: two writers would interleave their rows. The lock ends with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from fastrl.train.durable import sync

MARK = "__mark__"
HEADER = "__header__"


class PartialFile:
    """Owner of the unfinished file, open for appending.

    Attributes:
        done: items finished before this process.
        counts: what was counted over them.
    """

    def __init__(self, path: Path, scratch: Path, file: BinaryIO, done: int, counts: Mapping[str, int]) -> None:
        self.done = done
        self.counts = counts
        self._path, self._scratch, self._file = path, scratch, file

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one batch."""
        self._file.writelines(_line(row) for row in rows)

    def mark(self, done: int, counts: Mapping[str, int]) -> None:
        """Say how many items are finished; what was written before is on the disk when this returns."""
        self._file.write(_line({MARK: {"done": done, "counts": counts}}))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the rows under the file's name and remove the unfinished one."""
        self._file.flush()
        fresh = self._path.with_name(f".{self._path.name}.tmp")
        with self._scratch.open(encoding="utf-8") as source, fresh.open("w", encoding="utf-8") as target:
            target.writelines(line for line in source if not line.startswith((f'{{"{MARK}"', f'{{"{HEADER}"')))
        sync(fresh)
        fresh.rename(self._path)
        sync(self._path.parent)
        self._scratch.unlink()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def open_partial(path: Path, header: Mapping[str, Any]) -> PartialFile:
    """Start the file, or go on with what a killed run with the same header left.

    Args:
        header: JSON values that fix the rows: configuration and digests of what is read.

    Raises:
        ValueError: `path` is there already, another process is writing it, or a run with another header left an
            unfinished file with rows.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    file = os.fdopen(os.open(scratch, os.O_RDWR | os.O_CREAT, 0o644), "rb+")
    try:
        _lock(file, path)
        _refuse_existing(path)  # once more: the lock's last owner may have finished it just now
        first = json.dumps({HEADER: header}, sort_keys=True) + "\n"
        done, counts = _last_mark(file, first.encode(), scratch)
    except BaseException:
        file.close()
        raise
    return PartialFile(path, scratch, file, done, counts)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another --output_file")


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}; wait for it, or choose another --output_file") from None


def _last_mark(file: BinaryIO, header: bytes, scratch: Path) -> tuple[int, Mapping[str, int]]:
    """What was finished, with the file cut and standing behind it; a file without a mark is begun anew."""
    first = file.readline()
    end, done, counts = file.tell(), 0, {}
    for line in iter(file.readline, b""):
        if line.startswith(f'{{"{MARK}"'.encode()) and line.endswith(b"\n"):
            mark = json.loads(line)[MARK]
            end, done, counts = file.tell(), mark["done"], mark["counts"]
    if done and first != header:
        raise ValueError(
            f"{scratch} is the unfinished output of a run with other options or data; finish that run with its "
            "options, or remove the file"
        )
    file.seek(end if done else 0)
    if not done:
        file.write(header)
    file.truncate()
    return done, counts


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
