"""How rewards go together, and with length: what tells a reward that pays for words from one that pays for answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations


def correlation(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Pearson's correlation over the items that both have; None with fewer than two, or without spread.

        sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)

    Args:
        first, second: [S] numbers, None where there is none.
    """
    pairs = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    if len(pairs) < 2:
        return None
    n = len(pairs)
    mean_x, mean_y = math.fsum(x for x, _ in pairs) / n, math.fsum(y for _, y in pairs) / n
    spread = math.fsum((x - mean_x) ** 2 for x, _ in pairs) * math.fsum((y - mean_y) ** 2 for _, y in pairs)
    # Equal values may leave a spread of rounding errors, and a correlation of nothing with nothing.
    if len({x for x, _ in pairs}) == 1 or len({y for _, y in pairs}) == 1 or not spread > 0:
        return None
    together = math.fsum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return max(-1.0, min(1.0, together / math.sqrt(spread)))


def correlation_metrics(
    columns: Mapping[str, Sequence[float | None]], total: Sequence[float | None], lengths: Sequence[int]
) -> dict[str, float]:
    """`rewards/correlation/A/B` for each pair of rewards in their order, and of each and the sum with length.

    Args:
        columns: reward name -> [S] what it said.
        total: [S] the weighted sum; its entry is `rewards/correlation/reward/length`.
        lengths: [S] tokens of each completion.
    """
    found = {f"{a}/{b}": correlation(columns[a], columns[b]) for a, b in combinations(columns, 2)}
    found |= {f"{name}/length": correlation(column, lengths) for name, column in columns.items()}
    found["reward/length"] = correlation(total, lengths)
    return {f"rewards/correlation/{name}": value for name, value in found.items() if value is not None}
