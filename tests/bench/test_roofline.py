"""The calculated floor of the head: numbers a reader can check, and the committed figure and table are its output."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.roofline import BANDWIDTH, METHODS, PEAK, figure, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
AUTOGRAD, TWICE, SINGLE = METHODS


def test_operations_bytes_and_seconds_of_a_head_a_reader_can_check():
    n, d, v = 1000, 10, 100  # a small vocabulary: one chunk
    assert [m.operations(n, d, v) for m in METHODS] == [6e6, 8e6, 6e6]
    assert AUTOGRAD.bytes(n, d, v) == 36 * 1e5
    assert SINGLE.bytes(n, d, v) == TWICE.bytes(n, d, v) == 10 * 1e5 + 8 * 1e3
    assert SINGLE.seconds(n, d, v) == pytest.approx(6e6 / PEAK + 1.008e6 / BANDWIDTH)
    assert SINGLE.useful(n, d, v) * SINGLE.seconds(n, d, v) == pytest.approx(6e6)


@pytest.mark.parametrize("x", [(8192, 1024, 151_936), (8192, 4096, 128_256)])
def test_no_way_beats_the_roof_and_the_single_pass_beats_the_others(x):
    for method in METHODS:
        assert method.useful(*x) < min(PEAK, method.operations(*x) / method.bytes(*x) * BANDWIDTH)
    assert SINGLE.seconds(*x) < min(AUTOGRAD.seconds(*x), TWICE.seconds(*x))


def test_the_documents_show_what_the_script_says():
    assert (DOCS / "roofline.svg").read_text() == figure()
    assert "\n".join(table()) in (DOCS / "kernels.md").read_text()
    words = " ".join(ElementTree.fromstring(figure()).itertext())
    assert "calculated, not measured" in words
