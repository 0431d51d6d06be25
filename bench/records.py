"""Files of records, one JSON object a line: written whole or not at all, one case at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write(path: Path, records: Sequence[Record]) -> None:
    """Replace `path` by the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)


def put(path: Path, records: Sequence[Record]) -> None:
    """Write the records in the place of those that the file has of the same row, case, precision and threads.

    Records of other cases stay as they are, so that a program that measures one case loses nothing.
    """
    old = read(path)
    new = {case(record) for record in records}
    places = [number for number, record in enumerate(old) if case(record) in new]
    first = min(places, default=len(old))
    kept = [record for record in old[first:] if case(record) not in new]
    write(path, [*old[:first], *records, *kept])


def read(path: Path) -> list[Record]:
    """The records of a file; none when it is not there.

    Raises:
        ValueError: a line that is no record.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away and measure again") from None


def case(record: Record) -> tuple[Any, ...]:
    """What was measured together: records of one case stand against each other."""
    name = record["axis"] if "axis" in record else record["shape"]["name"]
    return record["row"], name, record.get("dtype"), record.get("threads")
