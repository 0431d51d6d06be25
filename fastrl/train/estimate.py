"""An accuracy with its sampling error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, its standard error, and how many prompts it is a mean of."""

    mean: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % +- {100 * self.standard_error:.1f} (n={self.n})"


def estimate(values: Sequence[Sequence[float | None]]) -> Estimate:
    """Average scores, clustered by prompt: samples of one prompt are not independent.

        mean = (1/n) sum_i x_i,   standard_error = sqrt(sum_i (x_i - mean)^2 / (n (n - 1))),   x_i = prompt i's mean

    Args:
        values: per prompt, the scores of its samples; None (no verdict) is left out, and so is a prompt of Nones.
    """
    means = [sum(kept) / len(kept) for scores in values if (kept := [x for x in scores if x is not None])]
    n = len(means)
    if n == 0:
        raise ValueError("no prompt has a score: every reward function returned None or failed")
    mean = sum(means) / n
    variance = sum((x - mean) ** 2 for x in means) / (n - 1) if n > 1 else 0.0
    return Estimate(mean=mean, standard_error=math.sqrt(variance / n), n=n)


def estimate_by_group(values: Sequence[float | None], group: Sequence[int]) -> Estimate:
    """`estimate` of [S] scores whose prompts are told apart by [S] group numbers."""
    by_group: dict[int, list[float | None]] = {}
    for value, number in zip(values, group, strict=True):
        by_group.setdefault(number, []).append(value)
    return estimate(list(by_group.values()))
