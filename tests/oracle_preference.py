"""The preference losses again, from the papers, in plain NumPy float64: one pair at a time, slopes by hand.

Each function of a pair returns (value, d value / d chosen, d value / d rejected). `c` and `r` are the two scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Triple = tuple[float, float, float]
Array = NDArray[np.float64]


def probability(x: float) -> float:
    """The logistic function, whose logarithm has the slope probability(-x)."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_probability(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def of_margin(value: float, slope: float, beta: float) -> Triple:
    """A loss of x = beta (c - r), with its slope by x."""
    return value, beta * slope, -beta * slope


def sigmoid(c: float, r: float, beta: float, e: float = 0.0) -> Triple:
    x = beta * (c - r)
    value = (1 - e) * math.log(1 + math.exp(-x)) + e * math.log(1 + math.exp(x))
    return of_margin(value, probability(x) - (1 - e), beta)


def robust(c: float, r: float, beta: float, e: float) -> Triple:
    x = beta * (c - r)
    value = ((1 - e) * math.log(1 + math.exp(-x)) - e * math.log(1 + math.exp(x))) / (1 - 2 * e)
    return of_margin(value, (-(1 - e) * probability(-x) - e * probability(x)) / (1 - 2 * e), beta)


def hinge(c: float, r: float, beta: float) -> Triple:
    x = beta * (c - r)
    return of_margin(1 - x, -1.0, beta) if x < 1 else (0.0, 0.0, 0.0)


def ipo(c: float, r: float, beta: float) -> Triple:
    gap = (c - r) - 1 / (2 * beta)
    return gap**2, 2 * gap, -2 * gap


def exo_pair(c: float, r: float, beta: float, e: float) -> Triple:
    x = beta * (c - r)
    q = probability(x)
    value = q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
    return of_margin(value, q * (1 - q) * (math.log(q / (1 - e)) - math.log((1 - q) / e)), beta)


def nca_pair(c: float, r: float, beta: float) -> Triple:
    value = -log_probability(beta * c) - 0.5 * log_probability(-beta * c) - 0.5 * log_probability(-beta * r)
    slope = beta * (-probability(-beta * c) + 0.5 * probability(beta * c))
    return value, slope, 0.5 * beta * probability(beta * r)


def bco_pair(c: float, r: float, beta: float) -> Triple:
    value = -log_probability(beta * c) - log_probability(-beta * r)
    return value, -beta * probability(-beta * c), beta * probability(beta * r)


def sppo_hard(c: float, r: float, beta: float) -> Triple:
    target = 1 / (2 * beta)
    return (c - target) ** 2 + (r + target) ** 2, 2 * (c - target), 2 * (r + target)


def bump(x: float) -> float:
    """Slope of the logistic function."""
    return probability(x) * probability(-x)


def apo_zero(c: float, r: float, beta: float) -> Triple:
    value = 1 - probability(beta * c) + probability(beta * r)
    return value, -beta * bump(beta * c), beta * bump(beta * r)


def apo_down(c: float, r: float, beta: float) -> Triple:
    x = beta * (c - r)
    value = probability(beta * c) + 1 - probability(x)
    return value, beta * bump(beta * c) - beta * bump(x), beta * bump(x)


def discopop(c: float, r: float, beta: float, tau: float = 0.05) -> Triple:
    x = beta * (c - r)
    m, logistic, exponential = probability(x / tau), -log_probability(x), math.exp(-x)
    slope = bump(x / tau) / tau * (exponential - logistic) - (1 - m) * probability(-x) - m * exponential
    return of_margin((1 - m) * logistic + m * exponential, slope, beta)


def simpo(c: float, r: float, beta: float, gamma: float, e: float = 0.0) -> Triple:
    x = beta * (c - r) - gamma
    value = (1 - e) * math.log(1 + math.exp(-x)) + e * math.log(1 + math.exp(x))
    return of_margin(value, probability(x) - (1 - e), beta)


def orpo(c: float, r: float, beta: float) -> Triple:
    """Odds as the paper writes them; d log odds / d l = 1 / (1 - p)."""
    p, q = math.exp(c), math.exp(r)
    x = math.log(p / -math.expm1(c)) - math.log(q / -math.expm1(r))
    slope = -beta * probability(-x)
    return -beta * log_probability(x), slope / -math.expm1(c), -slope / -math.expm1(r)


def kto(x: float, is_desirable: bool, z: float, beta: float, gain: float, loss: float) -> tuple[float, float]:
    """(value, slope by the log-ratio x)."""
    if is_desirable:
        return gain * (1 - probability(beta * (x - z))), -gain * beta * bump(beta * (x - z))
    return loss * (1 - probability(beta * (z - x))), loss * beta * bump(beta * (z - x))


def rrhf(logprob: Sequence[float], score: Sequence[float], group: Sequence[int]) -> tuple[Array, Array]:
    """(loss of each completion, slope of their sum by each log-probability)."""
    value, slope = np.zeros(len(logprob)), np.zeros(len(logprob))
    for i in range(len(logprob)):
        for j in range(len(logprob)):
            if group[i] == group[j] and score[i] > score[j] and logprob[j] > logprob[i]:
                value[i] += logprob[j] - logprob[i]
                slope[j] += 1
                slope[i] -= 1
    return value, slope
