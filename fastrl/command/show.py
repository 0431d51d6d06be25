"""What `fastrl RECIPE --help`, `config init` and `config schema` print about a configuration dataclass."""

from __future__ import annotations

import json
from textwrap import fill
from typing import Any, get_args, get_origin

from fastrl.command.fields import (
    REQUIRED,
    Option,
    accepts_null,
    choices,
    expected,
    is_list,
    item_of,
    options,
    summary,
    without_null,
)

WIDTH = 110


def recipe_help(name: str, config_type: type, *, has_dry_run: bool) -> str:
    """Usage and every option with its type, default and meaning."""
    lines = [summary(config_type), "", f"usage: fastrl {name} [--config FILE] [--key value ...]", ""]
    lines += ["  --config FILE", "      YAML file with any of the options below; flags beat it."]
    if has_dry_run:
        lines += ["  --dry-run", "      Run two prompts or rows through the whole pipeline, print them, train nothing."]
    for option in options(config_type):
        if option.block:
            continue
        default = "required" if option.default is REQUIRED else f"default {yaml_value(option.default)}"
        lines.append(f"  --{option.key}  ({expected(option.hint)}; {default})")
        lines.append(fill(option.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def init_yaml(name: str, config_type: type) -> str:
    """A YAML file with every option, its default and its meaning; required options are left empty."""
    lines = [f"# {summary(config_type)}", "# Fill in what is marked REQUIRED, delete what you do not change, then:"]
    lines += ["#     fastrl run THIS_FILE", f"recipe: {name}", ""]
    for option in options(config_type):
        indent = "  " * option.key.count(".")
        marked = "REQUIRED: " if option.default is REQUIRED else ""
        meaning = marked + option.meaning + _allowed(option)
        lines.append(fill(meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "))
        value = "" if option.block or option.default is REQUIRED else f" {yaml_value(option.default)}"
        lines.append(f"{indent}{option.key.rpartition('.')[2]}:{value}")
    return "\n".join(lines) + "\n"


def json_schema(name: str, config_type: type) -> str:
    """JSON Schema (draft 2020-12) of a recipe's YAML file, for editors."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"fastrl {name}",
        "description": summary(config_type),
        "type": "object",
        "additionalProperties": False,
        "properties": {"recipe": {"const": name}},
        "required": [],
    }
    for option in options(config_type):
        *path, leaf = option.key.split(".")
        owner = schema
        for block in path:
            owner = owner["properties"][block]
        owner["properties"][leaf] = _property(option)
        if option.default is REQUIRED:
            owner["required"].append(leaf)
    return json.dumps(schema, indent=2)


def yaml_value(value: Any) -> str:
    """A default as one line of YAML that YAML 1.1 and 1.2 readers agree on."""
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")
    return json.dumps(value)


def _allowed(option: Option) -> str:
    inner = item_of(option.hint) if is_list(option.hint) else option.hint
    return f" [{' | '.join(choices(inner))}]" if choices(inner) else ""


def _property(option: Option) -> dict[str, Any]:
    described: dict[str, Any] = {"description": option.meaning}
    if option.block:
        return described | {"type": "object", "additionalProperties": False, "properties": {}, "required": []}
    described |= _json_type(option.hint)
    return described if option.default is REQUIRED else described | {"default": option.default}


def _json_type(hint: Any) -> dict[str, Any]:
    if choices(hint):
        return {"enum": [*choices(hint), *([None] if accepts_null(hint) else [])]}
    names: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    inner = without_null(hint)
    extra: dict[str, Any] = {}
    if is_list(hint):
        name, extra = "array", {"items": _json_type(item_of(hint))}
    elif get_origin(inner) is dict:
        is_text = get_args(inner)[1] is str
        name, extra = "object", {"additionalProperties": {"type": "string" if is_text else "object"}}
    else:
        name = names[inner]
    return {"type": [name, "null"] if accepts_null(hint) else name} | extra
