"""1 when the completion's answer is JSON that a schema accepts."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text, final_answer

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


@promises(pure=True)
def json_schema(completions: Sequence[object], schema: Sequence[object], **_: object) -> list[float]:
    """1.0 where the answer is JSON valid under its row's schema, else 0.0.

    The whole answer part must be one JSON value (RFC 8259: no NaN, no comments), bare or in one Markdown fence.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is read.
        schema: [S] JSON Schemas: mappings, or the same as JSON text.

    Raises:
        ValueError: a schema is none. `check_rewards` finds that before training.
        RuntimeError: the package jsonschema is not installed.
    """
    return [
        _judged(completion_text(completion), _validator(schema_text(each)))
        for completion, each in zip(completions, schema, strict=True)
    ]


@promises(pure=True)
@dataclass(frozen=True)
class JsonSchema:
    """`json_schema` with one schema for every row.

    Attributes:
        schema: a mapping, or the path of a JSON file.
    """

    schema: Mapping[str, Any] | str

    __name__ = "json_schema"

    def __post_init__(self) -> None:
        if isinstance(self.schema, str):
            path = Path(self.schema)
            if not path.is_file():
                raise ValueError(f"json_schema: the schema file {path} does not exist")
            object.__setattr__(self, "schema", path.read_text(encoding="utf-8"))
        check_schema(self.schema)

    def __call__(self, completions: Sequence[object], **_: object) -> list[float]:
        """[S] completions -> [S] 0.0 or 1.0."""
        validator = _validator(schema_text(self.schema))
        return [_judged(completion_text(completion), validator) for completion in completions]


def check_schema(schema: object) -> None:
    """ValueError when it is no JSON Schema; RuntimeError when jsonschema is missing."""
    _validator(schema_text(schema))


def schema_text(schema: object) -> str:
    """The schema as JSON text, the key under which its validator is kept."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"json_schema needs a schema as a mapping or as JSON text, got {schema!r:.80}")
    return json.dumps(schema, sort_keys=True)


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    package = _package()
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise ValueError(f"json_schema: the schema is not JSON: {error}: {schema[:80]!r}") from error
    kind = package.validators.validator_for(parsed, default=package.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except package.SchemaError as error:
        raise ValueError(f"json_schema: this is no JSON Schema: {error.message}") from error
    return kind(parsed)


def _judged(text: str, validator: Any) -> float:
    answer = final_answer(text)
    if answer is None:
        return 0.0
    fenced = _FENCED.fullmatch(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer, parse_constant=_refuse)
    except (ValueError, RecursionError):  # RecursionError: ten thousand opening brackets
        return 0.0
    return float(validator.is_valid(value))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _package() -> Any:
    try:
        return importlib.import_module("jsonschema")
    except ModuleNotFoundError as error:
        if error.name != "jsonschema":
            raise
        raise RuntimeError("the json_schema reward needs a package: pip install 'jsonschema>=4.20'") from error
