"""Curves without a plotting library: a line of block characters for the terminal, SVG for the report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 400  # of a drawn curve; more would only make the file larger
_HOVER_POINTS = 60  # with a tooltip
_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 20  # margins around the plot, for the labels


def short_number(value: float) -> str:
    """Three significant digits, with k, M, G beyond a thousand and an exponent below a thousandth."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if magnitude >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if magnitude >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def thinned(values: Sequence[float], count: int) -> list[float]:
    """At most `count` values: means of consecutive, equally large runs; the input when it is short enough."""
    n = len(values)
    if n <= count:
        return list(values)
    edges = [index * n // count for index in range(count + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], width: int) -> str:
    """Finite values as one line of at most `width` block characters, lowest to highest of the line; "" for none."""
    finite = thinned([value for value in values if math.isfinite(value)], width)
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    if low == high:
        return _BLOCKS[3] * len(finite)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * steps)] for value in finite)


def smoothed(values: Sequence[float], *, reach: int) -> list[float]:
    """The straight line fitted to each value and its `reach` neighbours on both sides, read at the value.

    Away from the ends that is their mean. Unlike an exponential mean it does not lag behind a slope.
    """
    result = []
    for place in range(len(values)):
        first, after = max(0, place - reach), min(len(values), place + reach + 1)
        centre = (first + after - 1) / 2
        mean = math.fsum(values[first:after]) / (after - first)
        spread = sum((index - centre) ** 2 for index in range(first, after))
        tilt = sum((index - centre) * values[index] for index in range(first, after))
        result.append(mean + (tilt / spread if spread else 0.0) * (place - centre))
    return result


def svg_curve(points: Sequence[Point], *, title: str) -> str:
    """One metric over steps: the values faint, their smoothed course strong, least and greatest value labelled.

    Args:
        points: (step, value), finite, at least one, steps rising.
        title: the metric's name; escaped here.
    """
    steps = thinned([step for step, _ in points], _MOST_POINTS)
    values = thinned([value for _, value in points], _MOST_POINTS)
    low, high = _range(values)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    mean = smoothed(values, reach=len(values) // 25)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)} over steps">']
    for tick in (low, (low + high) / 2, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 3:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for step, anchor in ((first, "start"), (points[-1][0], "end")):
        place = _LEFT if anchor == "start" else _WIDTH - _RIGHT
        parts.append(
            f'<text class="tick" x="{place}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{short_number(step)}</text>'
        )
    if len(values) == 1:
        parts.append(f'<circle class="dot" cx="{x(steps[0]):.1f}" cy="{y(values[0]):.1f}" r="2.5"/>')
    for name, line in (("raw", values), ("mean", mean)):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, line, strict=True))
        parts.append(f'<polyline class="{name}" points="{path}"/>')
    stride = max(1, math.ceil(len(values) / _HOVER_POINTS))
    for step, value in list(zip(steps, values, strict=True))[::stride]:
        tooltip = f"<title>step {short_number(step)}: {value:.6g}</title>"
        parts.append(f'<circle class="hover" cx="{x(step):.1f}" cy="{y(value):.1f}" r="6">{tooltip}</circle>')
    return "".join([*parts, "</svg>"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of the plot; a constant gets room on both sides."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low, high
