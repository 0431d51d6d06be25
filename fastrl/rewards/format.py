"""1 when the completion is one reasoning block followed by one answer block, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


@promises(in_process=True, pure=True)
def think_format(completions: Sequence[object], **_: object) -> list[float]:
    """1.0 where the completion reads `<think>...</think><answer>...</answer>`, else 0.0.

    Each tag appears exactly once, in this order; both blocks hold something; only white space stands around and
    between them. (TRL's `think_format_reward` asks for the first block only.)

    Args:
        completions: [S] strings or message lists.
    """
    return [float(_is_think_answer(completion_text(completion))) for completion in completions]


def _is_think_answer(text: str) -> bool:
    # Counting first keeps the pattern linear: with one of each tag it cannot backtrack.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _THINK_ANSWER.fullmatch(text)
    return match is not None and all(block.strip() for block in match.groups())
