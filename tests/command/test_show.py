"""Help, `config init` and the JSON Schema, all read from the dataclasses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from fastrl.cli import RECIPES
from fastrl.command.fields import REQUIRED, options, summary
from fastrl.command.show import init_yaml, json_schema, recipe_help, yaml_value

NAMES = list(RECIPES)
CHECKS = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "null": type(None)}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that ours use, written out: a validator may not be installed."""
    assert schema.keys() <= {
        *("$schema", "title", "description", "default"),
        *("const", "enum", "type", "items", "properties", "required", "additionalProperties"),
    }
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not any(is_number if name == "number" else isinstance(value, CHECKS[name]) for name in names):
        return False
    if isinstance(value, list):
        return all(conforms(item, schema["items"]) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        assert schema["additionalProperties"] is False
        known = value.keys() <= schema["properties"].keys() and set(schema["required"]) <= value.keys()
        return known and all(conforms(item, schema["properties"][key]) for key, item in value.items())
    if isinstance(value, dict):
        return all(conforms(item, schema["additionalProperties"]) for item in value.values())
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_meaning_in_its_docstring(name: str) -> None:
    assert summary(RECIPES[name].config)
    assert [option.key for option in options(RECIPES[name].config) if not option.meaning] == []


@pytest.mark.parametrize("name", NAMES)
def test_init_writes_every_option_with_its_default(name: str) -> None:
    loaded = yaml.safe_load(init_yaml(name, RECIPES[name].config))
    assert loaded.pop("recipe") == name
    for option in options(RECIPES[name].config):
        *path, leaf = option.key.split(".")
        owner = loaded
        for block in path:
            owner = owner[block]
        if option.default is REQUIRED:
            assert owner[leaf] is None
        elif not option.block:
            wanted = list(option.default) if isinstance(option.default, tuple) else option.default
            assert owner[leaf] == wanted
            assert type(owner[leaf]) is type(wanted)
    assert "# REQUIRED" in init_yaml(name, RECIPES[name].config) or name == "demo"


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_what_init_wrote_once_it_is_filled_in(name: str) -> None:
    schema = json.loads(json_schema(name, RECIPES[name].config))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    filled = yaml.safe_load(init_yaml(name, RECIPES[name].config))
    for key in schema["required"]:
        filled[key] = {"array": ["numeric"], "object": {}}.get(schema["properties"][key]["type"], "somewhere")
    assert conforms(filled, schema)


def test_the_schema_refuses_what_the_command_line_refuses() -> None:
    schema = json.loads(json_schema("grpo", RECIPES["grpo"].config))
    good = {"recipe": "grpo", "model_name_or_path": "m", "output_dir": "o", "train_dataset": "d"}
    assert schema["required"] == ["model_name_or_path", "output_dir", "train_dataset"]
    assert conforms(good, schema)
    assert conforms(good | {"data": {"columns": {"prompt": "question"}, "max_rows": 3}, "algorithm": "dapo"}, schema)
    assert conforms(good | {"reward_weights": [1, 0.5], "parity": None, "learning_rate": 1e-6}, schema)
    wrong: list[dict[str, Any]] = [
        {"num_generatons": 4},
        {"data": {"max_row": 3}},
        {"data": {"columns": {"prompt": 1}}},
        {"algorithm": "grop"},
        {"seed": 1.5},
        {"seed": None},
        {"reward_funcs": "numeric"},
        {"recipe": "sft"},
    ]
    assert [conforms(good | change, schema) for change in wrong] == [False] * len(wrong)
    assert not conforms({"recipe": "grpo", "output_dir": "o", "train_dataset": "d"}, schema)


def test_help_lists_each_option_with_type_default_and_meaning() -> None:
    text = recipe_help("grpo", RECIPES["grpo"].config, has_dry_run=True)
    assert "  --num_generations  (a whole number; default 8)\n      completions per prompt (G).\n" in text
    assert "  --model_name_or_path  (text; required)\n" in text
    assert "  --data.max_rows  (a whole number or null; default null)\n" in text
    assert "  --dry-run\n" in text
    assert "--dry-run" not in recipe_help("eval", RECIPES["eval"].config, has_dry_run=False)


def test_small_floats_are_written_so_that_every_yaml_reader_sees_a_number() -> None:
    for value in (1e-6, 1e-8, 2.5e-7, 0.5, 1e22):
        assert yaml.safe_load(yaml_value(value)) == value
