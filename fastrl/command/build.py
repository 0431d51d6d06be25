"""Settings become a configuration record: every value gets its option's type, or every wrong one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from fastrl.command.fields import REQUIRED, Option, accepts_null, choices, expected, is_list, item_of
from fastrl.command.settings import Refused, Setting

Config = TypeVar("Config")


def build(config_type: type[Config], options: Sequence[Option], settings: Sequence[Setting]) -> Config:
    """A configuration from settings whose keys are all known; a flag beats the file.

    Raises:
        Refused: values of the wrong type and required options that are missing, one a line.
    """
    given = {setting.key: setting for setting in sorted(settings, key=lambda setting: setting.is_flag)}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for option in options:
        if option.key not in given:
            continue
        setting = given[option.key]
        if option.block:
            if setting.value is not None:
                wrong.append(f"{setting.source}: {option.key}: {_expected_block(option, options)}")
        else:
            try:
                values[option.key] = _typed(setting.value, option.hint)
            except ValueError:
                wrong.append(_wrong_value(setting, option))
    missing = [option for option in options if option.default is REQUIRED and option.key not in given]
    if missing:
        names = ", ".join(option.key for option in missing)
        wrong.append(f"missing: {names}; write `{missing[0].key}: ...` in the file or --{missing[0].key} ...")
    if wrong:
        raise Refused("\n".join(wrong))
    return config_type(**_given(config_type, values))


def _typed(value: Any, hint: Any) -> Any:
    """The value as the type, as jsonargparse reads it.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        # jsonargparse takes null for any type
        if not accepts_null(hint):
            raise ValueError("null")
        return None
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value})["value"]
    except ArgumentError as error:
        raise ValueError(str(error)) from None


def _wrong_value(setting: Setting, option: Option) -> str:
    where = setting.source if setting.is_flag else f"{setting.source}: {option.key}"
    return f"{where}: expected {expected(option.hint)}, got {_shown(setting.value)}{_remedy(setting, option)}"


def _remedy(setting: Setting, option: Option) -> str:
    value = setting.value
    if is_list(option.hint) and isinstance(value, str):
        return f"; write {option.key}: [{value}]"
    if is_list(option.hint) and isinstance(value, list) and len(value) == 1 and "," in str(value[0]):
        return f"; write --{option.key} {str(value[0]).replace(',', ' ')}"
    words = value if isinstance(value, list) else [value]
    allowed = choices(item_of(option.hint) if is_list(option.hint) else option.hint)
    for word in words:
        meant = get_close_matches(str(word), allowed, n=1)
        if word not in allowed and meant:
            return f" (did you mean '{meant[0]}'?)"
    return ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping"
    return repr(value)


def _expected_block(option: Option, options: Sequence[Option]) -> str:
    inside = [other.key.removeprefix(option.key + ".") for other in options if other.key.startswith(option.key + ".")]
    return f"expected a mapping with some of {', '.join(inside)}"


def _given(config: Any, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Field name -> value for a dataclass; blocks are made from their default and what was given inside them."""
    given: dict[str, Any] = {}
    for field in fields(config):
        key = prefix + field.name
        if key in values:
            given[field.name] = values[key]
        elif is_dataclass(field.default):
            inside = _given(field.default, values, key + ".")
            given[field.name] = replace(field.default, **inside)  # type: ignore[type-var]
    return given
