r"""1 when the completion's final answer is mathematically the gold answer: a number, or an expression in LaTeX.

Numbers are read and compared as `fastrl.rewards.numeric` does, exactly; everything else by the package math-verify.
Its own time limits are switched off: they need the main thread, and a worker's limit also holds where they do not.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from fastrl.rewards.numeric import NUMBER, gold_number, last_box, number_in, numbers_agree
from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

LONGEST_ANSWER = 500  # characters; nothing honest is longer, and a computer algebra system takes long over it

_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*[:=]){1,2}[ \t*:=]*([^\n]+)", re.IGNORECASE)
_HEADING = re.compile(r"\d+[.)][ \t]+\S")
_DELIMITERS = re.compile(r"\\[()\[\]]|(?<!\\)\$(?!\d)|(?<=\S)\$$|\*\*")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,!;: ]|~|\\quad|\{,\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?|°")
_NAMED = re.compile(r"[A-Za-z]\w{0,20}\s{0,3}=\s{0,3}")
_UNIT = re.compile(r"\s{0,3}(?:\\?%|(?:TEXT|[A-Za-z]{2,}|(?<=\s)[mgshL]\b)[A-Za-z ./²³-]*)?\s{0,3}(?:TEXT)?\s{0,3}\.?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt|max|min|gcd|lcm|mod)(?![A-Za-z]))[A-Za-z]{3,}")


@promises(pure=True)
def math_reward(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    r"""1.0 where the final answer equals the gold answer, else 0.0; no answer is 0.0.

    The final answer is, of the part `final_answer` returns, what follows the last `#### `, else the last `\boxed{}`,
    else what follows the last "answer is" or "answer:" on its line, else the last number, or the last formula where
    the gold is no number. Units and currencies are ignored, thousands separators read, a percent sign is a unit.

    Args:
        completions: [S] strings or message lists.
        answer: [S] gold: a number, GSM8K's whole solution, or maths in plain text or LaTeX.

    Raises:
        ValueError: a gold answer is no mathematics. `check_rewards` finds that before training.
        RuntimeError: math-verify is needed and not installed.

    Cost: 30 microseconds an item for numbers; milliseconds, once in a while seconds, for what math-verify compares.
    """
    return [
        float(_agrees(completion_text(completion), math_gold(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def math_gold(gold: object) -> Fraction | str:
    """A gold answer as an exact number, else as the text of an expression that math-verify can read.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(gold, str):
        return gold_number(gold)
    declared = _declared(gold)
    text = gold.strip() if declared is None else declared
    number = plain_number(text)
    if number is not None:
        return number
    if declared is None and "\n" in text:
        return gold_number(gold)  # a worked solution: its last number
    if not text or _WORD.search(_TEXT.sub("", text)) or not _parsed(text):
        raise ValueError(
            f"math_reward needs a number or a formula as answer, got {gold!r:.200}; exact_match takes text"
        )
    return text


def plain_number(text: str) -> Fraction | None:
    r"""The number of a text that is nothing but a number, perhaps with a name, a currency or a unit; else None.

    `x = 18`, `\$1{,}234.50`, `18\text{ cm}`, `25\%`, `90^\circ` are; `2x`, `5m` (a product?), `1, 2` are not.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    bare = _TEXT.sub(lambda found: " TEXT" if found[1].strip() and not number_in(found[1]) else found[1], text)
    bare = _DEGREES.sub("", _SPACES.sub(lambda found: "," if found[0] == "{,}" else "", _DELIMITERS.sub("", bare)))
    bare = bare.replace("\N{MINUS SIGN}", "-").strip()
    named = _NAMED.match(bare)
    bare = bare[named.end() :] if named else bare
    end = _number_end(bare)
    return number_in(bare[:end]) if end and _UNIT.fullmatch(bare, end) else None


def _number_end(text: str) -> int:
    """Where the number at the start of a text ends; 0 when none starts there."""
    found = NUMBER.match(text)
    return found.end() if found else 0


def _agrees(text: str, gold: Fraction | str) -> bool:
    answer = final_answer(text)
    if not answer:
        return False
    declared = _declared(answer)
    if isinstance(gold, str):
        candidate = answer[-LONGEST_ANSWER:] if declared is None else declared
        return len(candidate) <= LONGEST_ANSWER and _equal(gold, candidate, is_formula=declared is not None)
    if declared is None:
        return numbers_agree(number_in(answer), gold)
    number = plain_number(declared)
    if number is not None:
        return numbers_agree(number, gold)
    if len(declared) <= LONGEST_ANSWER and not _WORD.search(_TEXT.sub("", declared)):
        return _equal(_written(gold), declared, is_formula=True)
    return numbers_agree(number_in(answer), gold)


def _declared(text: str) -> str | None:
    """The text that is marked as the answer, if any: after `####`, in a box, after "answer is"."""
    marked = [found[1] for found in _HASHES.finditer(text) if not _HEADING.match(found[1])]
    if marked:
        return marked[-1].strip()
    box = last_box(text)
    if box is not None:
        return box.strip()
    said = _ANSWER_IS.findall(text)
    return said[-1].strip().rstrip(".") if said else None


def _written(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"\\frac{{{number.numerator}}}{{{number.denominator}}}"


def _equal(gold: str, candidate: str, *, is_formula: bool) -> bool:
    """Whether math-verify takes the two for the same.

    Args:
        is_formula: the candidate is nothing but a formula; otherwise a text in which one is looked for.
    """
    found = _parsed(candidate) if is_formula else _package().parse(candidate, parsing_timeout=None)
    return bool(_package().verify(_parsed(gold), found, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    r"""A formula as math-verify reads it inside a box; [] when it cannot."""
    inside = _DELIMITERS.sub("", text)
    found: list[Any] = _package().parse(f"\\boxed{{{inside}}}", parsing_timeout=None, fallback_mode="no_fallback")
    return found


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        package = importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        if error.name != "math_verify":
            raise
        raise RuntimeError("math_reward needs a package for formulas: pip install 'math-verify>=0.8'") from error
    # It warns that its time limits are off, which is what we want: the worker has one.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return package
