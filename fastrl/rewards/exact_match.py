"""1 when the completion's answer is the gold answer, character for character."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer


@promises(in_process=True, pure=True)
def exact_match(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """1.0 where the stripped answer part of the completion equals the stripped gold answer, else 0.0.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is compared.
        answer: [S] gold: strings, or numbers compared as Python prints them.

    Raises:
        ValueError: a gold answer is neither.
    """
    return [
        float(final_answer(completion_text(completion)) == gold_text(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gold_text(gold: object) -> str:
    """A gold answer as the text `exact_match` expects; ValueError when it is neither text nor a number."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise ValueError(f"exact_match needs a string or a number as answer, got {gold!r}")
    return str(gold).strip()
