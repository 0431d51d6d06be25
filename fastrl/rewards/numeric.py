r"""1 when the completion's number is the gold number.

The number of a text is read from the first of these that is there, and from its last occurrence:
`#### N`; `\boxed{...}`; "answer is N" or "answer: N"; any number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

RELATIVE_TOLERANCE = Fraction(1, 10**6)
LONGEST_NUMBER = 100  # characters; longer digit strings are noise, and exact arithmetic on them is an attack

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
NUMBER = re.compile(
    rf"""
    (?:(?<![\w.)\]}}%-])(?P<sign>[-+]))?        # a sign, not a subtraction, a range or a list bullet
    (?:\\?[$€£])?
    (?:
        (?:(?P<latex_whole>\d+)\s?)?\\[dt]?frac\s?\{{\s?(?P<latex_top>-?{_PLAIN})\s?\}}\s?\{{\s?(?P<latex_bottom>{_PLAIN})\s?\}}
      | (?P<whole>\d+)\s(?P<top>\d+)/(?P<bottom>\d+)
      | (?P<plain>{_PLAIN})
        (?: [eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)
          | \s?(?:\\times|\\cdot|[\N{{MULTIPLICATION SIGN}}x*])\s?10\^\{{?(?P<power>[-+]?\d{{1,3}})\}}?
          | \s?/\s?(?P<over>{_PLAIN})
        )?
    )
    """,
    re.VERBOSE | re.ASCII,
)
_HASHES = re.compile(r"####[ \t*:=$]*")
_HEADING = re.compile(r"[.)][ \t]+\S")  # "#### 1. Compute the total" is a Markdown heading, not an answer
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*[:=]){1,2}[\s*:=$\\(\[]*", re.IGNORECASE)
_BRACE = re.compile(r"\\f?box(?:ed)?\s?\{|[{}]")
_LATEX_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{")


@promises(in_process=True, pure=True)
def numeric(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """1.0 where the completion's number equals the gold number, else 0.0; no number is 0.0.

    Two integers must be equal; otherwise they may differ by 1e-6 of the larger magnitude.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        answer: [S] gold: a number, or a text read by the same rules (GSM8K's whole solution, say).

    Raises:
        ValueError: a gold answer holds no number. `check_rewards` finds that before training.
    """
    return [
        float(numbers_agree(number_in(completion_text(completion)), gold_number(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gold_number(gold: object) -> Fraction:
    """The number of a gold answer; ValueError when there is none."""
    number = None
    if isinstance(gold, str):
        number = number_in(gold)
    elif isinstance(gold, int | float) and not isinstance(gold, bool) and abs(gold) < float("inf"):
        number = Fraction(str(gold))
    if number is None:
        raise ValueError(f"numeric needs an answer with a number in it, got {gold!r}")
    return number


def numbers_agree(number: Fraction | None, gold: Fraction) -> bool:
    """Equal as integers, or within RELATIVE_TOLERANCE when one of the two is not an integer."""
    if number is None:
        return False
    if number.denominator == 1 and gold.denominator == 1:
        return number == gold
    return abs(number - gold) <= RELATIVE_TOLERANCE * max(abs(number), abs(gold))


def number_in(text: str) -> Fraction | None:
    r"""The number a text gives as its answer, exactly; None when it gives none.

    Read: signs, thousands separators (also LaTeX's `{,}`), currency, decimals, `3/4`, `1 1/2`, `\frac{3}{4}`,
    `1.2e-3`, `3 \times 10^{5}`. A percent sign is a unit: "25%" is 25.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    answer = answer.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\N{MINUS SIGN}", "-")
    declared = _number_after(_HASHES, answer)
    if declared is not None:
        return _value(declared)
    box = last_box(answer)
    if box is not None:
        inside = list(NUMBER.finditer(_LATEX_WRAPPER.sub("{", box)))
        # `\boxed{2x + 5}` declares an expression; its last number is not the answer.
        return _value(inside[0]) if len(inside) == 1 else None
    declared = _number_after(_ANSWER_IS, answer)
    if declared is not None:
        return _value(declared)
    everything = list(NUMBER.finditer(answer))
    return _value(everything[-1]) if everything else None


def _number_after(marker: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The number right after the last marker that has one."""
    found = None
    for start in marker.finditer(text):
        number = NUMBER.match(text, start.end())
        if number and not (marker is _HASHES and _HEADING.match(text, number.end())):
            found = number
    return found


def last_box(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` holds; a box that was never closed (a truncated text) does not count."""
    open_braces: list[int | None] = []  # for a box, where its content starts
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(None if brace[0] == "{" else brace.end())
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return text[slice(*last)] if last else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a matched number; None for a zero denominator or an absurd length."""
    if len(match[0]) > LONGEST_NUMBER:
        return None
    part = {name: text.replace(",", "") for name, text in match.groupdict().items() if text is not None}
    sign = -1 if part.get("sign") == "-" else 1
    whole = Fraction(part.get("latex_whole") or part.get("whole") or 0)
    if "plain" in part:
        exponent = part.get("exponent") or part.get("power") or "0"
        top, bottom = Fraction(f"{part['plain']}e{exponent}"), Fraction(part.get("over") or 1)
    else:
        top = Fraction(part.get("latex_top") or part["top"])
        bottom = Fraction(part.get("latex_bottom") or part["bottom"])
    return sign * (whole + top / bottom) if bottom else None
