r"""1 when the completion chooses the right letter.

The letter of a text is read from the first of these that is there, and from its last occurrence:
the whole answer (`C`, `(C)`, `C. Paris`); `\boxed{C}`; "answer is C", "answer: (C)"; a letter in parentheses, `(C)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

LETTERS = "ABCDE"

_MARKS = r"[\s*_$:]*"
_WRAPPED = r"\(?(?:\\text\s?\{|\\mathrm\s?\{|\\textbf\s?\{)?\(?"
_WHOLE = re.compile(rf"[*_(\[]*([{LETTERS}a-e])(?:[*_]*|[)\].:][*_]*(?:\s.*)?)", re.DOTALL)
_BOXED = re.compile(rf"\\f?box(?:ed)?\s?\{{{_MARKS}{_WRAPPED}([{LETTERS}a-e])(?![A-Za-z])")
# After "answer is" a small letter may be a word ("a matter of ..."), so it needs its bracket or the end of the line.
_DECLARED = re.compile(
    rf"(?i:answer(?:\s+is)?{_MARKS}(?:(?:option|choice){_MARKS})?){_WRAPPED}(?:([{LETTERS}])(?![A-Za-z'])|([a-e])(?=[)*.]*\s*$|\)))",
    re.MULTILINE,
)
_PARENTHESES = re.compile(rf"\(([{LETTERS}])\)")


@promises(in_process=True, pure=True)
def multiple_choice(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """1.0 where the completion's letter is the gold letter, else 0.0; no letter is 0.0.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        answer: [S] a letter from A to E.

    Raises:
        ValueError: a gold answer is no such letter. `check_rewards` finds that before training.
    """
    return [
        float(letter_in(completion_text(completion)) == gold_letter(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gold_letter(gold: object) -> str:
    """The letter of a gold answer; ValueError when it is none."""
    letter = gold.strip().strip("().").upper() if isinstance(gold, str) else ""
    if len(letter) != 1 or letter not in LETTERS:
        raise ValueError(f"multiple_choice needs a letter from A to {LETTERS[-1]} as answer, got {gold!r:.80}")
    return letter


def letter_in(text: str) -> str | None:
    """The letter a text chooses, as a capital; None when it chooses none."""
    answer = final_answer(text)
    if answer is None:
        return None
    whole = _WHOLE.fullmatch(answer)
    if whole:
        return whole[1].upper()
    for pattern in (_BOXED, _DECLARED, _PARENTHESES):
        found = pattern.findall(answer)
        if found:
            return "".join(found[-1]).upper()
    return None
