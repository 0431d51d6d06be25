"""Arithmetic for a model: an expression is parsed, never run, and no number may grow past a bound."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

LONGEST = 500  # characters
LARGEST_BITS = 4096  # of a number's numerator and denominator
_DEEPEST = 50

Number = Fraction | float

_BINARY: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: _power(a, b),
}
_FUNCTIONS: Mapping[str, Callable[[float], float]] = {
    name: getattr(math, name) for name in ("sqrt", "exp", "log", "log10", "sin", "cos", "tan")
}


def calculator(expression: str) -> str:
    """
    Evaluates an arithmetic expression exactly.

    Args:
        expression: Numbers, parentheses, + - * / // % **, and sqrt, exp, log, log10, sin, cos, tan, abs.

    Returns:
        The value.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression has at most {LONGEST} characters, got {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    try:
        return _written(_value(tree.body, 0))
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except OverflowError as error:
        raise ValueError("the result is too large") from error


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _DEEPEST:
        raise ValueError(f"an expression is at most {_DEEPEST} deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        if not math.isfinite(node.value):
            raise OverflowError
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left, depth + 1), _value(node.right, depth + 1)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
        value = _value(node.args[0], depth + 1)
        if node.func.id == "abs":
            return value if value >= 0 else -value
        if node.func.id in _FUNCTIONS:
            return _bounded(_FUNCTIONS[node.func.id](float(value)))
    return _refused(f"{ast.unparse(node)!r:.80}")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > LARGEST_BITS:  # before the work is done
            raise OverflowError
        return base**exponent.numerator
    if base < 0:
        return _refused("a root of a negative number")
    return float(math.pow(base, exponent))


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
            raise OverflowError
    elif not math.isfinite(value):
        raise OverflowError
    return value


def _refused(what: str) -> Number:
    raise ValueError(f"{what} is not arithmetic; use numbers, parentheses, + - * / // % **, sqrt, exp, log")


def _written(value: Number) -> str:
    """An integer as it is; else fifteen digits, without zeros at the end."""
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return str(value.numerator)
        value = float(value)
    return f"{value:.15g}"
