"""Rejection sampling: which of a prompt's judged completions become rows of a dataset, and of which format.

    pass(c)  =  reward(c) >= threshold, c ended by itself, c was judged
    sft         the distinct passing completions, best first
    preference  the best passing against the worst failing, then the next of each
    unpaired    every distinct judged completion, label = pass

A completion cut off by the length limit, or one a reward failed on, is in no row: nobody knows what it would have been.
Nor is an empty one: no stage can train on it.

Source: best-of-n, Nakano et al. 2021, arXiv:2112.09332, sec. 3.2; rejection sampling for SFT, Yuan et al. 2023,
arXiv:2308.01825 (RFT), sec. 3.2: distinct correct paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion of a prompt.

    Attributes:
        completion: text, or messages, as a dataset holds it.
        text: what makes two completions the same.
        reward: the verifiers' weighted sum; None when there is no verdict.
        is_whole: ended by itself, not by the length limit or a failure.
    """

    completion: Any
    text: str
    reward: float | None
    is_whole: bool


# prompt, its candidates, threshold, most rows -> rows
Selection = Callable[[Any, Sequence[Candidate], float, int | None], list[dict[str, Any]]]


def sft_rows(prompt: Any, candidates: Sequence[Candidate], threshold: float, limit: int | None) -> list[dict[str, Any]]:
    """`prompt, completion, reward` of the distinct passing completions, best first, as drawn among equals."""
    passing = [(c, r) for c, r in _judged(candidates) if r >= threshold]
    return [
        {"prompt": prompt, "completion": c.completion, "reward": r}
        for c, r in sorted(passing, key=lambda pair: -pair[1])[:limit]
    ]


def preference_rows(
    prompt: Any, candidates: Sequence[Candidate], threshold: float, limit: int | None
) -> list[dict[str, Any]]:
    """`prompt, chosen, rejected` and their rewards: the k-th best passing with the k-th worst failing."""
    judged = _judged(candidates)
    passing = sorted((pair for pair in judged if pair[1] >= threshold), key=lambda pair: -pair[1])
    failing = sorted((pair for pair in judged if pair[1] < threshold), key=lambda pair: pair[1])
    return [
        {
            "prompt": prompt,
            "chosen": good.completion,
            "rejected": bad.completion,
            "chosen_reward": high,
            "rejected_reward": low,
        }
        for (good, high), (bad, low) in list(zip(passing, failing, strict=False))[:limit]
    ]


def unpaired_rows(
    prompt: Any, candidates: Sequence[Candidate], threshold: float, limit: int | None
) -> list[dict[str, Any]]:
    """`prompt, completion, label, reward` of the distinct judged completions, in the order drawn."""
    return [
        {"prompt": prompt, "completion": c.completion, "label": r >= threshold, "reward": r}
        for c, r in _judged(candidates)[:limit]
    ]


SELECTIONS: dict[str, Selection] = {"sft": sft_rows, "preference": preference_rows, "unpaired": unpaired_rows}


def _judged(candidates: Sequence[Candidate]) -> list[tuple[Candidate, float]]:
    """Whole, judged, distinct, not empty completions with their rewards; the first of equal ones stays."""
    first: dict[str, tuple[Candidate, float]] = {}
    for candidate in candidates:
        text = candidate.text.strip()
        if text and candidate.is_whole and candidate.reward is not None:
            first.setdefault(text, (candidate, candidate.reward))
    return list(first.values())
