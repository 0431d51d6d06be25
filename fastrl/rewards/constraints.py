"""1 when the completion's values satisfy every constraint of its row: knights and knaves, cryptarithms, schedules.

A constraint is a text in a small language, read with Python's grammar and walked here; nothing is executed:

    names, numbers, 'texts', True, False;  + - * / // %;  == != < <= > >= (chained);  in (a, b, ...)
    not, and, or;  implies(a, b);  all_different(a, b, ...);  is_integer(a);  exactly(n, a, b, ...)

A says "B is a knave" is `A == (not B)`, with knights True. A value that makes a constraint meaningless (a text plus a
number, a division by 0) does not satisfy it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

Value = bool | Fraction | str

LONGEST_CONSTRAINT = 2000  # characters
_NUMBER = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30}|/\d{1,30})?", re.ASCII)
_WORDS: Mapping[str, bool] = {"true": True, "knight": True, "yes": True, "false": False, "knave": False, "no": False}
_BETWEEN = r"[*_`\"']*\s*(?:=|:|\bis\b|->|\N{RIGHTWARDS ARROW})\s*(?:(?:an?|the)\s+)?[*_`\"']*"


@promises(in_process=True, pure=True)
def constraints(completions: Sequence[object], constraints: Sequence[Sequence[str]], **_: object) -> list[float]:
    """1.0 where the answer gives every name in the constraints one value and all of them hold, else 0.0.

    The answer part is a JSON object, or says `name = value`, `name: value` or `name is (a) value` for each name.
    Values are numbers, true or false (also yes and no, knight and knave), or single words. Two different values for
    one name satisfy nothing. Any solution counts, not only a stored one.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        constraints: [S] lists of constraints; at least one each.

    Raises:
        ValueError: a constraint is outside the language. `check_rewards` finds that before training.
    """
    return [
        float(_satisfied(completion_text(completion), parsed(each)))
        for completion, each in zip(completions, constraints, strict=True)
    ]


def parsed(texts: object) -> list[ast.expr]:
    """A row's constraints as syntax trees; ValueError when one is outside the language, or there is none."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"constraints needs a list of at least one text, got {texts!r:.80}")
    found = [_parsed(text) for text in texts]
    if not any(isinstance(node, ast.Name) for tree in found for node in _operands(tree)):
        raise ValueError(f"constraints: no name occurs in {texts!r:.80}, so every answer would satisfy or break them")
    return found


@lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    if len(text) > LONGEST_CONSTRAINT:
        raise ValueError(f"constraints: a constraint may have {LONGEST_CONSTRAINT} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"constraints: cannot read {text!r:.80}: {error}") from error
    for node in _operands(tree):
        _check_node(node, text)
    return tree


def _operands(tree: ast.expr) -> list[ast.expr]:
    """The expressions of a tree, without the names of the functions that are called."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in called]


def _check_node(node: ast.expr, text: str) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float() | str()) | ast.Name() | ast.BoolOp() | ast.Tuple():
            return
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            return
        case ast.Compare(ops=ops) if all(type(op) in _COMPARISONS for op in ops):
            return
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return
    raise ValueError(f"constraints: {ast.unparse(node)!r:.60} in {text!r:.80} is not part of the language")


def _satisfied(text: str, trees: Sequence[ast.expr]) -> bool:
    answer = final_answer(text)
    if answer is None:
        return False
    names = {node.id for tree in trees for node in _operands(tree) if isinstance(node, ast.Name)}
    values = values_in(answer, names)
    if values is None:
        return False
    try:
        return all(_value(tree, values) is True for tree in trees)
    except (TypeError, ValueError, ArithmeticError):
        return False


def values_in(answer: str, names: set[str]) -> dict[str, Value] | None:
    """The value an answer gives each name; None when one has none, or two that differ."""
    try:
        found = json.loads(answer, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return {name: _read(str(found[name])) for name in names} if names <= found.keys() else None
    values = {}
    for name in names:
        said = re.findall(rf"(?<!\w){re.escape(name)}{_BETWEEN}([-+]?[\w./]*\w)", answer)
        different = {_read(word) for word in said}
        if len(different) != 1:
            return None
        values[name] = different.pop()
    return values


def _read(word: str) -> Value:
    if _NUMBER.fullmatch(word):
        top, _, bottom = word.partition("/")
        if not bottom or int(bottom):
            return Fraction(top) / Fraction(bottom or 1)
    return _WORDS.get(word.lower(), word)


def _value(node: ast.expr, values: Mapping[str, Value]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value if isinstance(value, bool | str) else Fraction(str(value))
        case ast.Name(id=name):
            return values[name]
        case ast.Tuple(elts=items):
            return tuple(_value(item, values) for item in items)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _truth(_value(inner, values))
        case ast.UnaryOp(operand=inner):
            return -_number(_value(inner, values))
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_truth(_value(part, values)) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_truth(_value(part, values)) for part in parts)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_number(_value(left, values)), _number(_value(right, values)))
        case ast.Compare(left=left, ops=ops, comparators=others):
            terms = [_value(term, values) for term in (left, *others)]
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(argument, values) for argument in arguments))
    raise AssertionError(f"{ast.dump(node)} passed the check")


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _number(value: Any) -> Fraction:
    if not isinstance(value, Fraction):
        raise TypeError(f"{value!r} is no number")
    return value


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)  # True is not 1 here


def _exactly(count: Any, *conditions: Any) -> bool:
    return sum(map(_truth, conditions)) == _number(count)


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: _equal,
    ast.NotEq: lambda a, b: not _equal(a, b),
    ast.Lt: lambda a, b: _number(a) < _number(b),
    ast.LtE: lambda a, b: _number(a) <= _number(b),
    ast.Gt: lambda a, b: _number(a) > _number(b),
    ast.GtE: lambda a, b: _number(a) >= _number(b),
    ast.In: lambda a, b: any(_equal(a, item) for item in b),
    ast.NotIn: lambda a, b: not any(_equal(a, item) for item in b),
}
_FUNCTIONS: Mapping[str, Callable[..., bool]] = {
    "implies": lambda a, b: not _truth(a) or _truth(b),
    "all_different": lambda *items: not any(_equal(a, b) for i, a in enumerate(items) for b in items[:i]),
    "is_integer": lambda a: _number(a).denominator == 1,
    "exactly": _exactly,
}
