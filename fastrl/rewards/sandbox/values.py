"""Plain values as JSON that keeps their types, and the comparison of two such trees.

    None, True, "text", [..]   themselves            1    {"i": "0x1"}           1.5  {"f": "0x1.8p+0"}
    (..)  {"t": [..]}    set {"s": [..]}, sorted     {k: v}  {"d": [[k, v], ..]}  b"" {"b": hex}  1j {"c": [re, im]}

`encode` runs beside the hostile code, `decode` and `same` never do. Comparing trees, not objects, leaves no `__eq__`
to lie and builds no hash table whose collisions an adversary could choose. This file is also sent into the sandbox:
it imports the standard library only and runs on Python 3.10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

DEEPEST = 64


def encode(value: Any, depth: int = DEEPEST) -> Any:
    """The tree of a value. Subclasses (defaultdict, IntEnum, namedtuple) become what they extend.

    Raises:
        ValueError: another type, or nested deeper than DEEPEST.
    """
    if value is None or value is True or value is False:
        return value
    if depth == 0:
        raise ValueError(f"a value is nested deeper than {DEEPEST}")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return {"i": hex(int.__index__(value))}
    if isinstance(value, float):
        return {"f": float.hex(value)}
    if isinstance(value, (list, tuple)):
        items = [encode(item, depth - 1) for item in value]
        return items if isinstance(value, list) else {"t": items}
    if isinstance(value, (set, frozenset)):
        return {"s": sorted((encode(item, depth - 1) for item in value), key=_text)}
    if isinstance(value, dict):
        return {"d": [[encode(key, depth - 1), encode(item, depth - 1)] for key, item in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": value.hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    raise ValueError(f"{type(value).__name__} is no plain value")


def decode(tree: Any, depth: int = DEEPEST) -> Any:
    """The value of a tree.

    Raises:
        ValueError: it is none that `encode` makes.
    """
    if tree is None or isinstance(tree, (bool, str)):
        return tree
    if depth == 0:
        raise ValueError(f"a value is nested deeper than {DEEPEST}")
    if isinstance(tree, list):
        return [decode(item, depth - 1) for item in tree]
    if not isinstance(tree, dict) or len(tree) != 1:
        raise ValueError("not a value's tree")
    ((tag, inner),) = tree.items()
    if tag in ("i", "f", "b") and isinstance(inner, str):
        return {"i": lambda text: int(text, 16), "f": float.fromhex, "b": bytes.fromhex}[tag](inner)
    if tag == "c" and isinstance(inner, list) and len(inner) == 2 and all(isinstance(part, str) for part in inner):
        return complex(float.fromhex(inner[0]), float.fromhex(inner[1]))
    if tag in ("t", "s") and isinstance(inner, list):
        items = (decode(item, depth - 1) for item in inner)
        return tuple(items) if tag == "t" else _hashed(set, items)
    if tag == "d" and isinstance(inner, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in inner):
        return _hashed(dict, ((decode(key, depth - 1), decode(item, depth - 1)) for key, item in inner))
    raise ValueError("not a value's tree")


def same(expected: Any, got: Any, *, tolerance: float = 0.0, depth: int = DEEPEST) -> bool:
    """Whether two trees are the same value: types, too; 0.0 is -0.0, and nan is nothing, as in Python.

    Args:
        expected: made by `encode`.
        got: parsed JSON of any origin.
        tolerance: floats may differ by `tolerance * max(1, |expected|)`.
    """
    if type(expected) is not type(got) or depth == 0:
        return False
    if isinstance(expected, list):
        return _all_same(expected, got, tolerance, depth)
    if not isinstance(expected, dict):
        return bool(expected == got)
    ((tag, inner),) = expected.items()
    if list(got) != [tag] or type(got[tag]) is not type(inner):
        return False
    other = got[tag]
    if tag == "f":
        return _close(inner, other, tolerance)
    if tag == "c":
        pairs = list(zip(inner, other, strict=False))
        return len(other) == 2 and all(isinstance(b, str) and _close(a, b, tolerance) for a, b in pairs)
    if tag == "t":
        return _all_same(inner, other, tolerance, depth)
    if tag == "s":
        return _all_same(sorted(inner, key=_order), sorted(other, key=_order), tolerance, depth)
    if tag == "d":
        return _all_same(sorted(inner, key=_key), sorted(other, key=_key), tolerance, depth)
    return bool(inner == other)


def sorted_tree(tree: Any) -> Any:
    """A list's or tuple's tree with its items in one fixed order; other trees as they are."""
    if isinstance(tree, list):
        return sorted(tree, key=_order)
    if isinstance(tree, dict) and isinstance(tree.get("t"), list):
        return {"t": sorted(tree["t"], key=_order)}
    return tree


def _all_same(expected: list[Any], got: list[Any], tolerance: float, depth: int) -> bool:
    return len(expected) == len(got) and all(
        same(a, b, tolerance=tolerance, depth=depth - 1) for a, b in zip(expected, got, strict=True)
    )


def _close(expected: str, got: str, tolerance: float) -> bool:
    try:
        a, b = float.fromhex(expected), float.fromhex(got)
    except (ValueError, OverflowError):
        return False
    return a == b or (math.isfinite(a) and abs(a - b) <= tolerance * max(1.0, abs(a)))


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def _key(pair: Any) -> tuple[str, Any]:
    return _order(pair[0] if isinstance(pair, list) and pair else pair)


def _order(tree: Any) -> tuple[str, Any]:
    """A sort key that compares with every other one, and floats by value, so that close ones are neighbours."""
    if isinstance(tree, list):
        return "[", [_order(item) for item in tree]
    if not isinstance(tree, dict) or len(tree) != 1:
        return "", _text(tree)
    ((tag, inner),) = tree.items()
    if tag != "f" or not isinstance(inner, str):
        return "{" + tag, _order(inner)
    try:
        value = float.fromhex(inner)
    except (ValueError, OverflowError):
        return "", _text(tree)
    return "f", math.inf if math.isnan(value) else value


def _hashed(kind: Any, items: Iterable[Any]) -> Any:
    try:
        return kind(items)
    except TypeError as error:
        raise ValueError("a set or a dict holds something that cannot be hashed") from error
