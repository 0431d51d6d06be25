"""A constitution: principles, which of them a prompt is held against, and the candidates that become a pair.

Source: Bai et al. 2022, arXiv:2212.08073, sec. 3.1 (a principle drawn for each prompt; critique, revision) and sec. 4.1
(a model's probabilities as preference labels).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True, slots=True)
class Principle:
    """One line of a constitution.

    Attributes:
        name: for the rows that it made; its text when it has no other.
        text: what it asks.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt.

    Attributes:
        text: without special tokens.
        is_whole: ended by itself.
        draft: number of the draft it is, or revises.
        critique: what the revision answers; None of a draft.
        score: the critic's, in [0, 1]; None when nobody scored it.
    """

    text: str
    is_whole: bool
    draft: int
    critique: str | None = None
    score: float | None = None


def read_principles(path: str) -> list[Principle]:
    """A YAML list of texts, or of mappings with `text` and perhaps `name`.

    Raises:
        ValueError: it is no such list, or empty.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: must be a list of principles, one text each")
    return [_principle(each, f"{path}: principle {number}") for number, each in enumerate(found, 1)]


def _principle(found: object, place: str) -> Principle:
    if isinstance(found, str) and found.strip():
        return Principle(found.strip(), found.strip())
    if isinstance(found, Mapping) and found.keys() <= {"name", "text"}:
        text, name = found.get("text"), found.get("name", found.get("text"))
        if isinstance(text, str) and isinstance(name, str) and text.strip() and name.strip():
            return Principle(name.strip(), text.strip())
    raise ValueError(f"{place}: must be a text, or {{name: ..., text: ...}}, got {found!r:.80}")


def drawn(principles: Sequence[Principle], *, seed: int, ordinal: int) -> Principle:
    """The principle of the prompt at this place of the file; the same in every run with the seed."""
    return random.Random(f"{seed}:{ordinal}").choice(principles)


def scored_pair(answers: Sequence[Answer], *, min_margin: float) -> tuple[Answer, Answer] | None:
    """The best and the worst answer; None when they tie, or differ by less than `min_margin`.

    Answers without a score, cut off, empty or said before are no candidates.
    """
    known: dict[str, Answer] = {}
    for answer in usable(answers):
        if answer.score is not None:
            known.setdefault(answer.text.strip(), answer)
    if len(known) < 2:
        return None
    scores = {text: answer.score or 0.0 for text, answer in known.items()}
    best, worst = max(scores, key=lambda text: scores[text]), min(scores, key=lambda text: scores[text])
    margin = scores[best] - scores[worst]
    return (known[best], known[worst]) if margin > 0 and margin >= min_margin else None


def revised_pairs(answers: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Each draft's last revision against the draft, where they differ."""
    drafts = {answer.draft: answer for answer in usable(answers) if answer.critique is None}
    last = {answer.draft: answer for answer in usable(answers) if answer.critique is not None}
    pairs = [(last[draft], drafts[draft]) for draft in drafts.keys() & last.keys()]
    return [(good, bad) for good, bad in pairs if good.text.strip() != bad.text.strip()]


def usable(answers: Sequence[Answer]) -> list[Answer]:
    """Those a trainer can learn from: whole and not empty."""
    return [answer for answer in answers if answer.is_whole and answer.text.strip()]
