"""What the configuration dataclasses say about themselves: every option's key, type, default and meaning.

The command line, the YAML reader, `config init` and the JSON Schema are all read from this one list.
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import getdoc
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = MISSING


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a configuration.

    Attributes:
        key: dotted path (`data.max_rows`).
        hint: resolved type.
        default: value when it is not given, or REQUIRED.
        meaning: one sentence from the docstring of its dataclass.
        block: the option is a nested dataclass; its own options follow it in the list.
    """

    key: str
    hint: Any
    default: Any
    meaning: str
    block: bool = False


def options(config_type: Any, *, defaults: Any = None, prefix: str = "") -> list[Option]:
    """Every option of a configuration dataclass, in the order of its fields; each block before what is inside it.

    Args:
        config_type: a dataclass whose nested dataclasses are blocks.
        defaults: an instance whose values are the defaults, in place of the fields' own.
        prefix: put before every key.
    """
    hints, meanings = get_type_hints(config_type), _meanings(config_type)
    found: list[Option] = []
    for field in fields(config_type):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if defaults is not None:
            default = vars(defaults)[field.name]
        key, hint = prefix + field.name, hints[field.name]
        found.append(Option(key, hint, default, meanings.get(field.name, ""), is_dataclass(hint)))
        if is_dataclass(hint):
            found += options(hint, defaults=default, prefix=key + ".")
    return found


def accepts_null(hint: Any) -> bool:
    """Whether None is a value of the type."""
    return type(None) in get_args(hint) or hint is type(None)


def without_null(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (inner,) = [part for part in get_args(hint) if part is not type(None)]
    return inner


def is_list(hint: Any) -> bool:
    """Whether values of the type are written as a list."""
    return get_origin(without_null(hint)) is tuple


def is_flag(hint: Any) -> bool:
    """Whether the option may stand alone on the command line, meaning true."""
    return without_null(hint) is bool


def item_of(hint: Any) -> Any:
    """Type of the items of a list type."""
    return get_args(without_null(hint))[0]


def choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, or nothing."""
    inner = without_null(hint)
    return get_args(inner) if get_origin(inner) is Literal else ()


def expected(hint: Any) -> str:
    """The type in words: "a number", "one of a, b or null", "a list of texts"."""
    inner = without_null(hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if is_list(hint):
        item = item_of(hint)
        plurals = {int: "whole numbers", float: "numbers", str: "texts"}
        text = f"a list of {plurals[item]}" if item in plurals else f"a list with items {expected(item)}"
    elif choices(hint):
        text = f"one of {', '.join(choices(hint))}"
    elif get_origin(inner) is dict:
        text = "a mapping {name: text}" if get_args(inner)[1] is str else "a mapping"
    else:
        text = words[inner]
    return text + (" or null" if accepts_null(hint) else "")


def summary(config_type: type) -> str:
    """First sentence of the dataclass's docstring."""
    return (getdoc(config_type) or "").split("\n\n")[0].replace("\n", " ")


def _meanings(config_type: type) -> dict[str, str]:
    """Field name -> text under `Attributes:` in the docstrings of the dataclass and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(config_type.__mro__[:-1]):
        section = (cls.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^ {8}([\w, ]+): (.+(?:\n {9,}.+)*)", section, flags=re.MULTILINE):
            meaning = " ".join(text.split())
            found |= dict.fromkeys(names.split(", "), meaning)
    return found
