"""Rewards for completions in GSM8K's form; numbers are judged by the built-in `numeric`."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fractions import Fraction

from fastrl.rewards import completion_text

_POSITIVE = r"\$?\d+(?:,\d{3})*(?:\.\d+)?"
_NUMBER = rf"-?{_POSITIVE}"
_ANSWER_LINE = re.compile(rf"\n#### {_NUMBER}\s*\Z")
# No operator before the equation or after it: "1 + 2 + 3 = 6" is not to be judged by its tail.
_EQUATION = re.compile(
    rf"(?<![$\w.,+*/-])(?<![-+*/x\u2013] )({_POSITIVE}) ?([-+*/x]) ?({_POSITIVE}) ?= ?({_NUMBER})"
    r"(?![\d.,]*\d| ?[-+*/x%] ?\$?\d)"
)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "x": operator.mul, "/": operator.truediv}


def answer_line(completions: Sequence[object]) -> list[float]:
    """1.0 where the completion ends with a line "#### number" and holds no other "####", else 0.0.

    It looks at the form alone: any number will do.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(bool(_ANSWER_LINE.search(text)) and text.count("####") == 1) for text in texts]


def true_equations(completions: Sequence[object]) -> list[float | None]:
    """The share of a completion's equations "a + b = c" that hold; None, no verdict, where it has none.

    One operator of + - * x / between two numbers; a result may be rounded to the decimals it shows.
    """
    return [_share_true(completion_text(completion)) for completion in completions]


def _share_true(text: str) -> float | None:
    verdicts = [_is_true(*found) for found in _EQUATION.findall(text)]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _is_true(left: str, sign: str, right: str, shown: str) -> bool:
    a, b, result = (Fraction(re.sub("[$,]", "", number)) for number in (left, right, shown))
    if sign == "/" and b == 0:
        return False
    decimals = len(shown.partition(".")[2])
    slack = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    error: Fraction = abs(_OPERATORS[sign](a, b) - result)
    return error <= slack
