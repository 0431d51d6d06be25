"""A file of JSON lines that is there whole or not at all, and whose writer may be killed and go on.

    .NAME.partial    a header that says what makes it, then rows; after each batch a mark {"done", "counts"}
    NAME             the rows alone, once all are there

What follows the last mark is half of a batch and is cut away; a batch is made alike the second time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fastrl.train.durable import sync

MARK = "__mark__"
HEADER = "__header__"


class PartialFile:
    """Owner of the unfinished file, open for appending.

    Attributes:
        done: items finished before this process.
        counts: what was counted over them.
    """

    def __init__(self, path: Path, scratch: Path, file: IO[str], done: int, counts: Mapping[str, int]) -> None:
        self.done = done
        self.counts = counts
        self._path, self._scratch, self._file = path, scratch, file

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one batch."""
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def mark(self, done: int, counts: Mapping[str, int]) -> None:
        """Say how many items are finished; what was written before is on the disk when this returns."""
        self._file.write(json.dumps({MARK: {"done": done, "counts": counts}}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the rows under the file's name and remove the unfinished one."""
        self._file.close()
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
        ValueError: `path` is there already, or a run with another header left an unfinished file.
    """
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another --output_file")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    first = json.dumps({HEADER: header}, sort_keys=True) + "\n"
    if not scratch.exists():
        scratch.write_text(first, encoding="utf-8")
    with scratch.open("rb+") as file:
        if file.readline() != first.encode():
            raise ValueError(
                f"{scratch} is the unfinished output of a run with other options or data; finish that run with its "
                "options, or remove the file"
            )
        end, done, counts = file.tell(), 0, {}
        for line in iter(file.readline, b""):
            if line.startswith(f'{{"{MARK}"'.encode()) and line.endswith(b"\n"):
                mark = json.loads(line)[MARK]
                end, done, counts = file.tell(), mark["done"], mark["counts"]
        file.truncate(end)
    return PartialFile(path, scratch, scratch.open("a", encoding="utf-8"), done, counts)
