"""What is wrong with a row and where: `file:row:/json/path: expected ..., got ...`, collected in one `DataError`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

SHOWN = 20  # problems printed in full; the rest are counted by class


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one row.

    Attributes:
        kind: class of the fault, what the summary counts by ("empty prompt").
        path: JSON pointer inside the row ("/messages/2/role"); empty for the row itself.
        expected: what should have been there.
        got: what was there.
        place: source and 1-based row ("train.jsonl:17"); empty until the reader that knows it adds it.
    """

    kind: str
    path: str
    expected: str
    got: str
    place: str = ""

    def __str__(self) -> str:
        where = ":".join(part for part in (self.place, self.path) if part)
        return f"{where or 'row'}: expected {self.expected}, got {self.got}"


class DataError(ValueError):
    """Rows that cannot be trained on.

    Attributes:
        problems: the first faults in reading order, at most as many as the raiser kept.
        counts: class of fault -> how often it occurred, also beyond `problems`.
    """

    def __init__(self, problems: Sequence[Problem], counts: Mapping[str, int] | None = None) -> None:
        self.problems = tuple(problems)
        self.counts = dict(Counter(problem.kind for problem in problems) if counts is None else counts)
        super().__init__(self.problems, self.counts)  # what pickle hands back to __init__

    def __str__(self) -> str:
        total = sum(self.counts.values())
        lines = [str(problem) for problem in self.problems[:SHOWN]]
        if total == 1:
            return lines[0]
        by_kind = ", ".join(f"{kind} {n}" for kind, n in sorted(self.counts.items(), key=lambda item: -item[1]))
        more = f"\n... and {total - len(lines)} more" if total > len(lines) else ""
        return f"{total} problems ({by_kind})\n" + "\n".join(lines) + more

    def at(self, place: str) -> DataError:
        """The same error, with `place` on every problem that has none yet."""
        return DataError([replace(problem, place=problem.place or place) for problem in self.problems], self.counts)


def described(value: object) -> str:
    """A value in a few words, for `Problem.got`; control characters are escaped and long texts cut."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value!r:.40}"
    if isinstance(value, str):
        return f"the string {value!r}" if len(value) <= 40 else f"the string {value[:40]!r}..."
    if isinstance(value, Mapping):
        return "an object with the keys " + (", ".join(repr(key)[:40] for key in list(value)[:8]) or "(none)")
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"
