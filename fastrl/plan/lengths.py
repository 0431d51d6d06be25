"""How long completions are: a lognormal distribution cut off at a limit, as sampled completions have it."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist, fmean

QUANTILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompts and completions.

    Attributes:
        prompt: tokens of every prompt.
        median: of the completions.
        longest: completions are cut off here.
        sigma: standard deviation of the logarithm; 0 makes all completions `median` tokens long.
    """

    prompt: int
    median: int
    longest: int
    sigma: float = 0.8

    def completions(self) -> list[float]:
        """Lengths at evenly spaced quantiles: their mean is the expectation, to a thousandth."""
        normal = NormalDist()
        points = ((i + 0.5) / QUANTILES for i in range(QUANTILES))
        return [min(self.longest, exp(log(self.median) + self.sigma * normal.inv_cdf(p))) for p in points]

    def mean(self) -> float:
        """Expected tokens of a completion."""
        return fmean(self.completions())

    def mean_square(self) -> float:
        """Expected square of the tokens of prompt and completion together: what causal attention costs."""
        return fmean((self.prompt + n) ** 2 for n in self.completions())
