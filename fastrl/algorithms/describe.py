"""An algorithm in words: every choice and every number of a record, defaults included."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial


def describe(value: object, indent: int = 0) -> str:
    """A record, function or number as the Python that would make it; partial applications are unwrapped.

        partial(clipped, high=0.28)  ->  clipped(low=0.2, high=0.28, dual_clip=None, delta=None)

    Args:
        value: a dataclass instance, a function or `functools.partial` of one, or anything with a readable repr.
        indent: spaces before the lines of a nested record.
    """
    if is_dataclass(value) and not isinstance(value, type):
        inner = " " * (indent + 4)
        lines = [f"{inner}{f.name}={describe(getattr(value, f.name), indent + 4)},\n" for f in fields(value)]
        return f"{type(value).__name__}(\n{''.join(lines)}{' ' * indent})"
    if callable(value):
        return _call(value, indent)
    return repr(value)


def unwrapped(function: Callable[..., object]) -> Callable[..., object]:
    """The function inside any number of partial applications."""
    while isinstance(function, partial):
        function = function.func
    return function


def _call(function: Callable[..., object], indent: int) -> str:
    """name(option=value, ...) with every keyword-only option; the name alone when there is none."""
    name = getattr(unwrapped(function), "__qualname__", None) or repr(function)  # a foreign callable may lack a name
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    listed = ", ".join(f"{p.name}={'?' if p.default is p.empty else describe(p.default, indent)}" for p in options)
    return f"{name}({listed})" if listed else name
