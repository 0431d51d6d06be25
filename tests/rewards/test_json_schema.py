from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastrl.rewards import JsonSchema, Reward, check_rewards, json_schema, resolve_reward

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(RuntimeError, match="pip install 'jsonschema"):
        JsonSchema({"type": "null"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('```json\n{"name": "Ada",\n "age": 36}\n```', 1.0),
        ('<think>{}</think><answer>{"name": "Ada", "age": 36}</answer>', 1.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": 36, "x": 1}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('{"name": "Ada", "age": 36} as you asked', 0.0),
        ('{"name": "Ada", ', 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 5000, 0.0),
        ("", 0.0),
    ],
)
def test_only_valid_json_that_the_schema_accepts_counts(text: str, value: float) -> None:
    pytest.importorskip("jsonschema")
    assert json_schema([text, text], [SCHEMA, json.dumps(SCHEMA)]) == [value, value]


def test_one_schema_for_all_rows_comes_from_the_spec_or_a_file(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array", "minItems": 2}))
    for reward in (
        resolve_reward("json_schema(schema={'type': 'array', 'minItems': 2})"),
        resolve_reward(f"json_schema(schema={str(tmp_path / 'schema.json')!r})"),
    ):
        assert reward(["[1, 2]", "[1]"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="does not exist"):
        JsonSchema("nowhere.json")


def test_a_schema_that_is_none_is_found_before_training() -> None:
    pytest.importorskip("jsonschema")
    for schema, reason in (({"type": "objekt"}, "no JSON Schema"), ("{", "not JSON"), (3, "a mapping or as JSON text")):
        with pytest.raises(ValueError, match=reason):
            check_rewards([Reward(json_schema)], {"schema": [schema]})
