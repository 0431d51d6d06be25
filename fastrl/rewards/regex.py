"""1 when the completion's answer matches a regular expression, whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer


@promises(pure=True)
def regex(completions: Sequence[object], pattern: Sequence[str], **_: object) -> list[float]:
    r"""1.0 where the whole answer part matches its row's pattern, else 0.0; write `.*x.*` to search.

    Python's `re` with DOTALL. A pattern such as `(a+)+b` takes exponential time on some texts, and a policy finds
    them: keep patterns linear.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        pattern: [S] regular expressions.

    Raises:
        ValueError: a pattern is none. `check_rewards` finds that before training.
    """
    return [_judged(completion, compiled(each)) for completion, each in zip(completions, pattern, strict=True)]


@promises(pure=True)
@dataclass(frozen=True)
class Regex:
    """`regex` with one pattern for every row.

    Attributes:
        pattern: a regular expression.
    """

    pattern: str

    __name__ = "regex"

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def __call__(self, completions: Sequence[object], **_: object) -> list[float]:
        """[S] completions -> [S] 0.0 or 1.0."""
        return [_judged(completion, compiled(self.pattern)) for completion in completions]


def compiled(pattern: object) -> re.Pattern[str]:
    """The pattern, ready to match; ValueError when it is none."""
    if not isinstance(pattern, str):
        raise ValueError(f"regex needs a pattern as text, got {pattern!r:.80}")
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex: {pattern!r} is no regular expression: {error}") from error


def _judged(completion: object, pattern: re.Pattern[str]) -> float:
    answer = final_answer(completion_text(completion))
    return float(answer is not None and pattern.fullmatch(answer) is not None)
