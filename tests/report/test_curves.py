from __future__ import annotations

import re

import pytest

from fastrl.report.curves import short_number, smoothed, sparkline, svg_curve, thinned


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (-2, "-2"),
        (999, "999"),
        (999.4, "999"),
        (999.9, "1k"),
        (12345, "12.3k"),
        (2.5e6, "2.5M"),
        (-3e9, "-3G"),
        (1e-6, "1.0e-6"),
        (1e-12, "1.0e-12"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(value, text):
    assert short_number(value) == text


def test_long_series_are_thinned_to_means():
    assert thinned([1, 2, 3, 4, 5, 6], 3) == [1.5, 3.5, 5.5]
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert len(thinned(list(range(1001)), 400)) == 400


def test_a_sparkline_spans_its_own_range():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 8) == "▄▄"
    assert sparkline([1, float("nan"), 2], 8) == "▁█"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 48)) == 48


def test_smoothing_is_a_local_mean_that_keeps_straight_lines():
    assert smoothed([0, 3, 6, 9, 12], reach=2) == pytest.approx([0, 3, 6, 9, 12])
    # Means inside; at the ends, the line through the last two.
    assert smoothed([0, 3, 0, 3, 9], reach=1) == pytest.approx([0, 1, 2, 4, 9])
    # Four values at the left end of reach 3: mean 2, slope 0.8, read 1.5 places left of their centre.
    assert smoothed([2, 0, 2, 4, 2, 0, 2], reach=3)[0] == pytest.approx(2 - 1.5 * 0.8)
    assert smoothed([4.0], reach=3) == [4.0]


def test_a_curve_is_drawn_inside_its_box_with_its_extremes_labelled():
    svg = svg_curve([(1, 0.5), (2, -1.5), (3, 2.5)], title="a & b")
    assert 'aria-label="a &amp; b over steps"' in svg
    for label in (">-1.5<", ">0.5<", ">2.5<", ">1<", ">3<", "<title>step 2: -1.5</title>"):
        assert label in svg
    raw = re.search(r'class="raw" points="([^"]*)"', svg)
    assert raw is not None
    # 340 x 150 with margins 46, 10, 10, 20: lowest value at y = 130, highest at y = 10.
    assert raw[1] == "46.0,70.0 188.0,130.0 330.0,10.0"


def test_one_point_and_a_constant_can_be_drawn():
    assert 'class="dot"' in svg_curve([(7, 0.0)], title="x")
    assert "nan" not in svg_curve([(7, 3.0), (8, 3.0)], title="x")
    assert len(svg_curve([(step, step % 7) for step in range(100_000)], title="x")) < 30_000
