"""Prompts and completions made from a row's columns: format strings, one-turn conversations, a system prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from string import Formatter
from typing import Any

from fastrl.data.problems import DataError, Problem, described
from fastrl.data.readers import Row, Rows


def apply_templates(
    rows: Rows,
    *,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    system_prompt: str | None = None,
    apply_chat_template: bool = False,
) -> Rows:
    """Rows with the prompt and completion that the configuration's `data` block describes.

    Applied in this order: `prompt_template` and `completion_template` make columns that the rows lack;
    `apply_chat_template` turns a plain prompt into one user message and plain completions into one
    assistant message each; `system_prompt` becomes the first message of each conversation.

    Args:
        prompt_template: Python format string over the columns, `"Q: {question}\\nA:"`; literal braces doubled.
        completion_template: the same for the completion.

    Returns:
        A view: a row that cannot be made raises `DataError` when it is read, and `check_rows` reports it.

    Raises:
        ValueError: a template that is not a format string over named columns.
    """
    if prompt_template is not None:
        rows = rows.map(_template_step("prompt", prompt_template))
    if completion_template is not None:
        rows = rows.map(_template_step("completion", completion_template))
    if apply_chat_template:
        rows = rows.map(as_conversation)
    if system_prompt is not None:
        rows = rows.map(partial(with_system_prompt, system_prompt=system_prompt))
    return rows


def filled(template: str, row: Mapping[str, Any], *, name: str = "template") -> str:
    """`template.format(**row)`, where every field is the name of a column that is not null.

    Raises:
        DataError: the row lacks a column, or its value does not take the field's format.
    """
    for field in template_fields(template, name=name):
        if row.get(field) is None:
            got = "null" if field in row else f"only {', '.join(map(repr, row))}"
            raise DataError([Problem("missing column", f"/{field}", f"the column {field!r} of {name}", got)])
    try:
        return template.format_map(row)
    except (TypeError, ValueError) as error:
        raise DataError([Problem("wrong type", "", f"columns that fit {name} {template!r}", str(error))]) from error


def template_fields(template: str, *, name: str = "template") -> list[str]:
    """The columns a template names.

    Raises:
        ValueError: unbalanced braces, a field without a name, an attribute or an index.
    """
    try:
        parts = [(field, spec or "") for _, field, spec, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name} {template!r}: {error}; write {{{{ and }}}} for literal braces") from error
    for field, spec in parts:
        if not field or field.isdigit() or any(sign in field for sign in ".[") or "{" in spec:
            raise ValueError(
                f"{name} {template!r}: a field must be the name of a column, got {{{field}}}; double literal braces"
            )
    return [field for field, _ in parts]


def as_conversation(row: Row) -> Row:
    """The row with plain prompts and completions as messages; rows that hold messages stay as they are.

    Raises:
        DataError: the row has neither a prompt nor messages.
    """
    if row.get("messages") is not None:
        return row
    if row.get("prompt") is None:
        raise DataError(
            [Problem("missing column", "/prompt", "a prompt or messages for apply_chat_template", described(row))]
        )
    made = dict(row)
    made["prompt"] = _one_message("user", row["prompt"])
    for name in ("completion", "chosen", "rejected"):
        if name in row:
            made[name] = _one_message("assistant", row[name])
    if isinstance(row.get("completions"), list):
        made["completions"] = [_one_message("assistant", completion) for completion in row["completions"]]
    return made


def with_system_prompt(row: Row, system_prompt: str) -> Row:
    """The row with `system_prompt` as the first message of its prompt or messages.

    Raises:
        DataError: the row is not a conversation, or has a system message already.
    """
    name = "messages" if row.get("messages") is not None else "prompt"
    messages = row.get(name)
    if not isinstance(messages, list):
        expected = "a conversation for system_prompt (apply_chat_template makes one of a plain prompt)"
        raise DataError([Problem("wrong type", f"/{name}", expected, described(messages))])
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "system":
            expected = "no system message beside system_prompt"
            raise DataError([Problem("second system message", f"/{name}/{i}", expected, "one")])
    return {**row, name: [{"role": "system", "content": system_prompt}, *messages]}


def _template_step(column: str, template: str) -> partial[Row]:
    template_fields(template, name=f"{column}_template")
    return partial(_with_column, column=column, template=template)


def _with_column(row: Row, column: str, template: str) -> Row:
    name = f"{column}_template"
    if row.get(column) is not None:
        # Keeping either value would ignore the other in silence.
        expected = f"no column {column!r} beside {name} (rename it with `columns` to use it in the template)"
        raise DataError([Problem("extra column", f"/{column}", expected, described(row[column]))])
    return {**row, column: filled(template, row, name=name)}


def _one_message(role: str, value: object) -> object:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
