"""Rows from JSONL, parquet or any sequence of mappings, each with its place; none is dropped in silence."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, overload

from fastrl.data.problems import DataError, Problem, described

Row = dict[str, Any]
Step = Callable[[Any], Row]


class Indexable(Protocol):
    """What `read_rows` needs of an object: a length, and a mapping at each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Sequence[Row]):
    """An immutable view of a source. A row is made when it is read; reading a bad one raises `DataError`.

    Attributes:
        source: file name, or the type of the object that was given.
        values: what the source holds: undecoded lines of a JSONL file, mappings otherwise.
        indices: the places in `values` that this view shows.
        steps: functions applied in order to a value; the first makes a row of it.
    """

    source: str
    values: Indexable = field(repr=False)
    indices: Sequence[int] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return replace(self, indices=self.indices[index])
        row = self.outcome(index)
        if isinstance(row, DataError):
            raise row
        return row

    def outcome(self, index: int) -> Row | DataError:
        """The row, or the reason why it cannot be read: what a pass over good and bad rows alike needs."""
        value = self.values[self.indices[index]]
        try:
            for step in self.steps:
                value = step(value)
        except DataError as error:
            return error.at(self.place(index))
        row: Row = value
        return row

    def place(self, index: int) -> str:
        """`source:row`; the row is 1-based: the line of a JSONL file."""
        return f"{self.source}:{self.indices[index] + 1}"

    def raw(self, index: int) -> object:
        """What the source holds at this row, before any step; the line's text for JSONL."""
        value = self.values[self.indices[index]]
        return value.decode("utf-8", "backslashreplace").rstrip("\r\n") if isinstance(value, bytes) else value

    def select(self, indices: Sequence[int]) -> Rows:
        """The rows at `indices` of this view, in that order."""
        return replace(self, indices=[self.indices[i] for i in indices])

    def map(self, step: Callable[[Row], Row]) -> Rows:
        """A view whose rows pass through `step` too; it may refuse one with a `DataError` that has no place."""
        return replace(self, steps=(*self.steps, step))


def read_rows(
    source: str | Path | Indexable, *, columns: Mapping[str, str] = MappingProxyType({}), max_rows: int | None = None
) -> Rows:
    """Rows of a JSONL (`.jsonl`, `.jsonl.gz`) or parquet file, or of an object such as a list or a `datasets.Dataset`.

    JSONL is strict: UTF-8 without a byte order mark, one JSON object per line, no repeated key, no NaN, blank
    lines at the end of the file only. A bad line stays in the result and raises when it is read, so that
    `check_rows` reports it and `split_rows` sets it aside. verl's rows get a column `ground_truth` from
    `reward_model.ground_truth` when they have none.

    Args:
        source: a path, or anything with `__len__` and `__getitem__` that gives mappings.
        columns: new name -> name in the source; the old name goes. See `apply_columns`.
        max_rows: only the first rows are used; None uses all.

    Raises:
        DataError: no such file, an unknown suffix, a damaged container, an object that is not a table.
        RuntimeError: a parquet file without pyarrow.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    steps: tuple[Step, ...] = (_mapping_row, _with_ground_truth)
    values: Indexable
    if isinstance(source, str | Path):
        path = Path(source)
        name = path.name
        if name.endswith((".jsonl", ".jsonl.gz")):
            values = _jsonl_lines(_existing(path), max_rows)
            steps = (_parsed_line, _with_ground_truth)
        elif name.endswith(".parquet"):
            values = _parquet_rows(_existing(path), max_rows)
        else:
            raise DataError([Problem("unknown file type", "", "a .jsonl, .jsonl.gz or .parquet file", "another", name)])
    else:
        name, values = _table(source)
    count = len(values) if max_rows is None else min(len(values), max_rows)
    if columns:
        steps = (*steps, partial(apply_columns, columns=columns))
    return Rows(name, values, range(count), steps)


def apply_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Rename columns: new name -> old name. A new name replaces a column that had it; one old name may serve several.

    Raises:
        DataError: the row lacks a column that `columns` names.
    """
    for old in columns.values():
        if old not in row:
            have = ", ".join(map(repr, row))
            raise DataError(
                [Problem("missing column", f"/{old}", f"the column {old!r} that `columns` renames", f"only {have}")]
            )
    moved = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {new: row[old] for new, old in columns.items()}


def _existing(path: Path) -> Path:
    if not path.is_file():
        got = "a directory" if path.is_dir() else "no such file"
        raise DataError([Problem("missing file", "", "a data file", got, str(path))])
    return path


def _table(source: Indexable) -> tuple[str, Indexable]:
    name = type(source).__name__
    if isinstance(source, Mapping):
        raise DataError([Problem("not a table", "", f"rows; choose one of {list(source)[:8]}", "a mapping", name)])
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        expected = "an object with a length and rows by index (a list, a datasets.Dataset that is not streamed)"
        raise DataError([Problem("not a table", "", expected, f"a {name}", name)])
    return name, source


def _jsonl_lines(path: Path, max_rows: int | None) -> list[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            lines = list(islice(file, max_rows))
            is_whole = not file.read(1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError([Problem("damaged file", "", "a whole gzip file", str(error), path.name)]) from error
    while is_whole and lines and not lines[-1].strip():
        lines.pop()
    return lines


def _parquet_rows(path: Path, max_rows: int | None) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError(f"reading {path.name} needs pyarrow, which is not installed: pip install pyarrow") from error
    rows: list[Row] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                rows.extend(batch.to_pylist())
                if max_rows is not None and len(rows) >= max_rows:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError([Problem("damaged file", "", "a whole parquet file", first_line, path.name)]) from error
    return rows


def _mapping_row(value: object) -> Row:
    if not isinstance(value, Mapping):
        raise _refused("not an object", "an object with named columns", described(value))
    return dict(value)


def _parsed_line(line: bytes) -> Row:
    if line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _refused("byte order mark", "UTF-8 without a byte order mark (save the file again so)", "one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused("not UTF-8", "UTF-8", f"byte 0x{line[error.start]:02x} at byte {error.start + 1}") from error
    if not text.strip():
        raise _refused("blank line", "a JSON object (blank lines are allowed at the end only)", "a blank line")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _refused("invalid JSON", "one JSON object on the line", f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # from the hooks below, numbers or nesting beyond Python's limits
        raise _refused("invalid JSON", "one JSON object on the line", str(error)) from error
    if not isinstance(value, dict):
        raise _refused("not an object", "a JSON object", described(value))
    return value


def _refused_constant(name: str) -> object:
    raise ValueError(f"{name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return value


# Python's decoder would take NaN and keep the last of two equal keys without a word.
_DECODER = json.JSONDecoder(parse_constant=_refused_constant, object_pairs_hook=_unique_keys)


def _with_ground_truth(row: Row) -> Row:
    judged = row.get("reward_model")
    if "ground_truth" in row or not isinstance(judged, Mapping) or "ground_truth" not in judged:
        return row
    return {**row, "ground_truth": judged["ground_truth"]}


def _refused(kind: str, expected: str, got: str) -> DataError:
    return DataError([Problem(kind, "", expected, got)])
