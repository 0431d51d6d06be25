"""The dataset formats: which columns make a row, and whether they hold plain text or messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row, Rows


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of row.

    Attributes:
        name: TRL's word for it; "scored" and "ranked" are ours.
        columns: what every row must hold; other columns may be there too.
        is_conversational: prompts, completions and `messages` are lists of messages, not strings.
    """

    name: str
    columns: tuple[str, ...]
    is_conversational: bool = False


TEXT = Format("text", ("text",))
MESSAGES = Format("messages", ("messages",), is_conversational=True)
PROMPT = Format("prompt", ("prompt",))
PROMPT_COMPLETION = Format("prompt_completion", ("prompt", "completion"))
PREFERENCE = Format("preference", ("prompt", "chosen", "rejected"))
UNPAIRED = Format("unpaired_preference", ("prompt", "completion", "label"))
STEPWISE = Format("stepwise_supervision", ("prompt", "completions", "labels"))
SCORED = Format("scored", ("prompt", "completions", "scores"))  # higher is better
RANKED = Format("ranked", ("prompt", "completions", "ranks"))  # 1 is the best
FORMATS = (TEXT, MESSAGES, PROMPT, PROMPT_COMPLETION, PREFERENCE, UNPAIRED, STEPWISE, SCORED, RANKED)


def detect_format(rows: Rows, *, among: Sequence[Format] = FORMATS) -> Format:
    """The format of the first readable row: the largest set of columns in `among` that it holds.

    A column that is null counts as absent, as tables of mixed rows are filled with nulls.

    Args:
        among: the formats the caller can use; a preference file read for its prompts alone passes `(PROMPT,)`.

    Returns:
        One of `among`, with `is_conversational` set as the row has it.

    Raises:
        DataError: no rows, no readable row, or columns that fit none or several of the formats.
    """
    index, row = _first_readable(rows)
    present = {name for name, value in row.items() if value is not None}
    fitting = [format for format in among if present.issuperset(format.columns)]
    largest = [a for a in fitting if not any(set(a.columns) < set(b.columns) for b in fitting)]
    if len(largest) == 1:
        return _as_written(largest[0], row)
    have = ", ".join(map(repr, sorted(present))) or "none"
    if largest:
        kind, expected = "ambiguous format", f"columns of one format, not of {_listed(largest)}"
    else:
        kind, expected = "unknown format", f"columns {_listed(among)} (rename with `columns`)"
    raise DataError([Problem(kind, "", expected, f"columns {have}", rows.place(index))])


def _as_written(format: Format, row: Row) -> Format:
    if format.columns == TEXT.columns or format.columns == MESSAGES.columns:
        return format
    return replace(format, is_conversational=isinstance(row["prompt"], list | tuple))


def _first_readable(rows: Rows) -> tuple[int, Row]:
    if len(rows) == 0:
        raise DataError([Problem("no rows", "", "at least one row", "none", rows.source)])
    for index in range(len(rows)):
        row = rows.outcome(index)
        if not isinstance(row, DataError):
            return index, row
    raise DataError(
        [Problem("no rows", "", "a readable row", f"{len(rows)} unreadable ones; {rows.outcome(0)}", rows.source)]
    )


def _listed(formats: Iterable[Format]) -> str:
    return " | ".join(", ".join(format.columns) for format in formats)
