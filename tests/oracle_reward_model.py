"""The losses of scoring models again, in plain NumPy float64, one number at a time, slopes by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tests.oracle_preference import log_probability, probability


def bradley_terry(chosen: float, rejected: float, margin: float = 0.0) -> tuple[float, float, float]:
    """(value, d / d chosen, d / d rejected)."""
    x = chosen - rejected - margin
    return -log_probability(x), -probability(-x), probability(-x)


def centering(chosen: float, rejected: float) -> tuple[float, float, float]:
    return (chosen + rejected) ** 2, 2 * (chosen + rejected), 2 * (chosen + rejected)


def ranking(score: Sequence[float], quality: Sequence[float]) -> tuple[float, list[float]]:
    """InstructGPT's loss of one prompt: the mean over its ordered pairs, and the slope of every score."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(score)), 2) if quality[i] > quality[j]]
    value, slope = 0.0, [0.0] * len(score)
    for i, j in pairs:
        loss, by_better, by_worse = bradley_terry(score[i], score[j])
        value += loss / len(pairs)
        slope[i] += by_better / len(pairs)
        slope[j] += by_worse / len(pairs)
    return value, slope


def step_cross_entropy(score: float, is_right: bool) -> tuple[float, float]:
    value = -log_probability(score) if is_right else -log_probability(-score)
    return value, probability(score) - is_right


def expected_calibration_error(confidence: Sequence[float], is_right: Sequence[bool], bins: int) -> float:
    members: dict[int, list[tuple[float, bool]]] = {}
    for each in zip(confidence, is_right, strict=True):
        members.setdefault(max(math.ceil(each[0] * bins), 1), []).append(each)
    gaps = [abs(sum(right - sure for sure, right in group)) for group in members.values()]
    return sum(gaps) / len(confidence)
