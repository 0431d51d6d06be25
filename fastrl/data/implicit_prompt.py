"""Preference rows whose prompt is only what chosen and rejected have in common at their start."""

from __future__ import annotations

from typing import Any

from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row


def with_prompt(row: Row) -> Row:
    """The row with its prompt taken out of chosen and rejected; rows that have a prompt stay as they are.

    Of conversations, the prompt is the common messages. Of texts, it is the common text up to its last white space,
    so that no word is cut in two and the answers begin with the space, as tokenizers expect; without any white space
    it is all that is common. A plain prompt beside conversations is a copy of what they begin with, and is replaced.

    Raises:
        DataError: chosen and rejected have no common start, or one of them is the start of the other.
    """
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)) and not (_is_list(chosen) and _is_list(rejected)):
        return row
    prompt = row.get("prompt")
    if prompt is not None and (_is_list(prompt) or isinstance(chosen, str)):
        return row
    if prompt is not None and chosen[0] != rejected[0]:
        return row  # the answers alone are conversations: check_rows says what is wrong with the prompt
    if chosen == rejected:
        raise _refused("/rejected", "equal completions", "something else than chosen", "the same")
    n = _common(chosen, rejected)
    if isinstance(chosen, str) and len(head := chosen[:n].rstrip()) and any(map(str.isspace, chosen[:n])):
        # Back to the white space before the last word, unless the common text ends with it already.
        n = len(head) if len(head) < n else max(i for i in range(n) if chosen[i].isspace())
    if n == 0:
        expected = "a prompt, or chosen and rejected that begin alike"
        raise _refused("/prompt", "missing column", expected, "no column 'prompt' and no common start")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if n == len(answer):
            raise _refused(f"/{name}", "empty completion", "an answer after what both begin with", "none")
    return {**row, "prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _common(one: Any, other: Any) -> int:
    """Length of the common start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _refused(path: str, kind: str, expected: str, got: str) -> DataError:
    return DataError([Problem(kind, path, expected, got)])
