"""What detectors read: every metric of a run as a curve, its beginning and its recent past, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Point = tuple[int, float]

KEPT_FIRST = 100  # points of each curve
KEPT_LAST = 1000


class History:
    """Curves of a log that is still being written; owns its lists.

    Attributes:
        curves: metric -> (step, value) in the order of the log; the middle of a long curve is forgotten.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[Point]] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in one line of the log. Values that are no finite numbers are no points."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curve = self.curves.setdefault(name, [])
                curve.append((step, float(value)))
                if len(curve) > 2 * (KEPT_FIRST + KEPT_LAST):
                    del curve[KEPT_FIRST:-KEPT_LAST]
