"""1 when the completion lists the gold items: in any order, or in theirs.

The answer part is one JSON list, or items between commas, semicolons or line breaks. White space, quotes and list
markers around an item are dropped; two items are equal as numbers where both are numbers, else as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fractions import Fraction

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

_SEPARATOR = re.compile(r"[,;\n]")
_MARKER = re.compile(r"^\s*(?:[-*\N{BULLET}]|\d{1,4}[.)])\s+")
_NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40})?", re.ASCII)
_QUOTES = "\"'`"

Item = str | Fraction


@promises(in_process=True, pure=True)
def set_equality(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """1.0 where the completion names exactly the gold items, in any order and however often, else 0.0.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        answer: [S] gold: lists of texts and numbers, or texts read by the same rules.

    Raises:
        ValueError: a gold answer has no item. `check_rewards` finds that before training.
    """
    return [
        float(set(items_in(completion_text(completion)) or ()) == set(gold_items(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


@promises(in_process=True, pure=True)
def sequence_equality(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """1.0 where the completion lists the gold items in their order, each as often, else 0.0.

    Arguments and errors as `set_equality`.
    """
    return [
        float(items_in(completion_text(completion)) == gold_items(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gold_items(gold: object) -> list[Item]:
    """The items of a gold answer; ValueError when there are none: an empty answer would earn the reward."""
    found = [_item(str(each)) for each in gold] if isinstance(gold, list | tuple) else []
    if isinstance(gold, str):
        found = items_in(gold) or []
    if not found:
        raise ValueError(f"set_equality and sequence_equality need an answer with items, got {gold!r:.80}")
    return found


def items_in(text: str) -> list[Item] | None:
    """The items a text lists, in order; None when it gives no answer."""
    answer = final_answer(text)
    if answer is None:
        return None
    if answer.startswith("[") and answer.endswith("]"):
        listed = _json_list(answer)
        if listed is not None:
            return [_item(str(each)) for each in listed]
        answer = answer[1:-1]  # Python's list, or a mathematician's
    elif answer[:1] + answer[-1:] in ("{}", "()"):
        answer = answer[1:-1]
    parts = (_MARKER.sub("", part).strip() for part in _SEPARATOR.split(answer))
    return [_item(part) for part in parts if part]


def _json_list(text: str) -> list[object] | None:
    try:
        found = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _item(text: str) -> Item:
    stripped = text.strip().strip(_QUOTES).strip()
    return Fraction(stripped) if _NUMBER.fullmatch(stripped) else stripped
