"""Plain values travel with their types, and are compared as trees."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum
from typing import Any

import pytest

from fastrl.rewards.sandbox.values import DEEPEST, decode, encode, same, sorted_tree

VALUES = [None, True, 0, -(10**30), 0.1, -0.0, 1e308, math.inf, 2 + 3j, "é\ud800", b"\x00", [], (1, [2]), {1, 2}, {}]
VALUES += [{1: "a", "1": "b", (1, 2): [None]}, [[[]]], {"i": "0x1"}, {(): set()}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_types_count() -> None:
    trees = [encode(value) for value in (1, 1.0, True, "1", [1], (1,), {1}, {1: 1}, None, 1 + 0j, b"1")]
    assert [[same(a, b) for b in trees] for a in trees] == [[i == j for j in range(11)] for i in range(11)]


def test_subclasses_are_what_they_extend() -> None:
    Point = namedtuple("Point", "x y")
    One = IntEnum("One", "one")
    assert encode(Point(1, 2)) == encode((1, 2))
    assert encode([One.one]) == encode([1])  # type: ignore[attr-defined]
    assert encode(Counter("a")) == encode(defaultdict(int, a=1)) == encode(OrderedDict(a=1)) == encode({"a": 1})


def test_sets_and_dicts_have_no_order_and_lists_have() -> None:
    assert same(encode({"a", "b", "c"}), {"s": ["c", "a", "b"]})
    assert same(encode({1: 2, 3: 4}), encode({3: 4, 1: 2}))
    assert not same(encode([1, 2]), encode([2, 1]))
    assert sorted_tree(encode([2, 1])) == sorted_tree(encode([1, 2]))
    assert sorted_tree(encode((2, 1))) != sorted_tree(encode([1, 2]))


def test_floats_are_exact_unless_a_tolerance_is_given() -> None:
    assert not same(encode(0.3), encode(0.1 + 0.2))
    assert same(encode([0.3]), encode([0.1 + 0.2]), tolerance=1e-9)
    assert same(encode(1e9), encode(1e9 + 1), tolerance=1e-8)
    assert not same(encode(1.0), encode(1.1), tolerance=0.05)
    assert same(encode(0.0), encode(-0.0))
    assert not same(encode(math.nan), encode(math.nan), tolerance=1.0)
    assert not same(encode(1.0), encode(math.inf), tolerance=1.0)
    assert not same(encode(math.inf), encode(1.0), tolerance=1.0)


FORGED = [
    {},
    {"i": "0x1", "f": "0x1p0"},
    {"i": 1},
    {"i": "x"},
    {"q": []},
    {"d": [1]},
    {"d": [[1]]},
    {"s": [[]]},
    7,
    1.5,
]
FORGED += [{"c": ["0x1p0"]}, {"c": "ab"}, {"f": "x"}, {"f": "1" * 400 + "e400"}, {"b": "0"}, {"t": {}}, {"s": None}]


@pytest.mark.parametrize("tree", FORGED, ids=repr)
def test_a_forged_tree_is_refused_and_equal_to_nothing(tree: Any) -> None:
    with pytest.raises((ValueError, OverflowError)):
        decode(tree)
    assert not any(same(encode(value), tree) for value in VALUES)


def test_without_an_order_floats_are_paired_by_their_values() -> None:
    above = math.nextafter(1.0, 2.0)
    for expected, got in (
        ({1.0, 2.0}, {above, 2.0}),
        ({0.0, -1.0}, {-0.0, -1.0}),
        ({(0.0, 1), (-1.0, 2)}, {(-0.0, 1), (-1.0, 2)}),
    ):
        assert same(encode(expected), encode(got), tolerance=1e-9)
        assert same(sorted_tree(encode(list(expected))), sorted_tree(encode(list(got))), tolerance=1e-9)
    assert same(encode({1.0: "a", 2.0: "b"}), encode({2.0: "b", above: "a"}), tolerance=1e-9)
    assert not same(encode({1.0, 2.0}), encode({1.0, 3.0}), tolerance=1e-9)
    for forged in ([{"f": "nan"}, {"f": "x"}], [{"f": "0x1p9999"}, {"f": 1}], [{"f": "0x1p0"}, None]):
        assert not same(encode({1.0, 2.0}), {"s": forged}, tolerance=1e-9)


def test_what_is_no_plain_value_or_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(DEEPEST):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        encode(deep)
    with pytest.raises(ValueError, match="nested deeper"):
        decode(deep)
    assert not same(deep, deep)
    with pytest.raises(ValueError, match="range is no plain value"):
        encode([range(3)])
