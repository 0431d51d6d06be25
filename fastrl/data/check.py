"""One streaming pass over the rows before any GPU work: each fault is named by file, row and JSON path."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastrl.data.formats import MESSAGES, TEXT, Format, detect_format
from fastrl.data.problems import SHOWN, DataError, Problem, described
from fastrl.data.readers import Row, Rows

ROLES = ("system", "user", "assistant", "tool")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one; no tokenizer can encode it


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row set aside by `split_rows`.

    Attributes:
        row: what the source holds there: the line's text for JSONL, else the mapping.
        place: source and 1-based row.
        problems: why it was refused.
    """

    row: object
    place: str
    problems: tuple[Problem, ...]


def check_rows(
    rows: Rows,
    formats: Format | Sequence[Format],
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] | None = None,
    id_column: str = "id",
) -> Format:
    """Refuse rows that cannot be trained on.

    Args:
        rows: read once, in order.
        formats: those the caller can use; all rows must have the format of the first.
        required: further columns every row must hold, not null (what a reward function reads).
        optional: the only other columns a row may hold (besides `tools` and `id_column`); None allows any.
        id_column: where it is present, its values must differ.

    Returns:
        The format that all rows have.

    Raises:
        DataError: the first 20 faults, and how many of each class the whole source has.
    """
    format = detect_format(rows, among=_listed(formats))
    first: list[Problem] = []
    counts: Counter[str] = Counter()
    for _, problems in _inspected(rows, format, required, optional, id_column):
        counts.update(problem.kind for problem in problems)
        first.extend(problems[: SHOWN - len(first)])
    if first:
        raise DataError(first, counts)
    return format


def split_rows(
    rows: Rows,
    formats: Format | Sequence[Format],
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] | None = None,
    id_column: str = "id",
) -> tuple[Rows, list[Rejected]]:
    """The rows `check_rows` would accept, and the others with their reasons; arguments as there.

    Raises:
        DataError: no format is recognised, or no row is left.
    """
    format = detect_format(rows, among=_listed(formats))
    accepted: list[int] = []
    rejected: list[Rejected] = []
    for index, problems in _inspected(rows, format, required, optional, id_column):
        if problems:
            rejected.append(Rejected(rows.raw(index), rows.place(index), tuple(problems)))
        else:
            accepted.append(index)
    if not accepted:
        counts = Counter(problem.kind for each in rejected for problem in each.problems)
        raise DataError([problem for each in rejected[:SHOWN] for problem in each.problems], counts)
    return rows.select(accepted), rejected


def find_overlap(train: Rows, held_out: Rows, format: Format) -> list[Problem]:
    """One problem per held-out row whose question is also in the training rows (both already checked).

    The question is the prompt, the text, or the messages before the last assistant turn; equality is exact
    but for white space around plain text. To refuse: `if problems: raise DataError(problems)`.
    """
    seen: dict[bytes, str] = {}
    for index, row in enumerate(train):
        seen.setdefault(_question_digest(row, format), train.place(index))
    problems = []
    for index, row in enumerate(held_out):
        twin = seen.get(_question_digest(row, format))
        if twin is not None:
            problem = Problem(
                "train/eval overlap", f"/{format.columns[0]}", "a question not trained on", f"that of {twin}"
            )
            problems.append(replace(problem, place=held_out.place(index)))
    return problems


def row_problems(row: Row, format: Format) -> Iterator[Problem]:
    """Faults of one row's own columns, without their place."""
    for name in format.columns:
        value = row.get(name)
        if value is None:
            yield Problem("missing column", f"/{name}", f"a column {name!r}", "null" if name in row else "none")
        elif name == "text":
            yield from _text_problems(f"/{name}", value, "empty text")
        elif name == "messages":
            yield from _messages_problems(f"/{name}", value)
        elif name == "prompt":
            yield from _prompt_problems(f"/{name}", value, format)
        elif name in ("completion", "chosen", "rejected"):
            yield from _completion_problems(f"/{name}", value, format)
        elif name == "label":
            yield from _label_problems(f"/{name}", value)
    if (
        row.get("chosen") is not None
        and {"chosen", "rejected"} <= {*format.columns}
        and row["chosen"] == row.get("rejected")
    ):
        yield Problem("equal completions", "/rejected", "something else than chosen", "the same")
    for name, check in (("labels", _label_problems), ("scores", _score_problems), ("ranks", _score_problems)):
        if name in format.columns and row.get("completions") is not None and row.get(name) is not None:
            yield from _judged_list_problems(row["completions"], name, row[name], check, format)
    yield from _tools_problems(row.get("tools"))
    yield from _verl_problems(row)


def _listed(formats: Format | Sequence[Format]) -> Sequence[Format]:
    return (formats,) if isinstance(formats, Format) else formats


def _inspected(
    rows: Rows, format: Format, required: Sequence[str], optional: Sequence[str] | None, id_column: str
) -> Iterator[tuple[int, list[Problem]]]:
    allowed = None if optional is None else {*format.columns, *required, *optional, "tools", id_column}
    first_with: dict[str, str] = {}
    for index in range(len(rows)):
        place = rows.place(index)
        row = rows.outcome(index)
        if isinstance(row, DataError):
            yield index, list(row.problems)
            continue
        problems = list(row_problems(row, format))
        for name in required:
            if row.get(name) is None:
                got = "null" if name in row else "none"
                problems.append(Problem("missing column", f"/{name}", f"a column {name!r}", got))
        if allowed is not None:
            only = f"only {', '.join(sorted(allowed))}"
            extra = [name for name in row if name not in allowed]
            problems += [Problem("extra column", f"/{name}", only, "one more") for name in extra]
        if row.get(id_column) is not None:
            twin = first_with.setdefault(repr(row[id_column]), place)
            if twin != place:
                problems.append(Problem("duplicate id", f"/{id_column}", "an id of its own", f"that of {twin}"))
        yield index, [replace(problem, place=place) for problem in problems]


def _text_problems(path: str, value: object, kind: str) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem("wrong type", path, "a string", described(value))
    elif not value.strip():
        yield Problem(kind, path, "text", described(value))
    elif _LONE_SURROGATE.search(value):
        yield Problem("not UTF-8", path, "text that UTF-8 can hold", "half of a surrogate pair")


def _conversation_problems(path: str, value: object) -> Iterator[Problem]:
    if not isinstance(value, list | tuple):
        yield Problem("wrong type", path, "a list of messages", described(value))
        return
    if not value:
        yield Problem("no messages", path, "at least one message", "an empty list")
    for i, message in enumerate(value):
        yield from _message_problems(f"{path}/{i}", message)


def _message_problems(path: str, message: object) -> Iterator[Problem]:
    if not isinstance(message, Mapping):
        yield Problem("wrong type", path, "an object with role and content", described(message))
        return
    role = message.get("role")
    if role not in ROLES:
        got = described(role) if "role" in message else described(message)
        yield Problem("unknown role", f"{path}/role", f"one of {', '.join(ROLES)}", got)
    content = message.get("content")
    is_call = role == "assistant" and bool(message.get("tool_calls"))
    if (is_call and content in (None, "")) or (role == "tool" and content == ""):
        return
    if "content" not in message:
        yield Problem("wrong type", f"{path}/content", "a string", described(message))
        return
    yield from _text_problems(f"{path}/content", content, "empty message")


def _messages_problems(path: str, value: object) -> Iterator[Problem]:
    problems = list(_conversation_problems(path, value))
    yield from problems
    if not problems and "assistant" not in _roles(value):
        yield Problem("no assistant turn", path, "a message of the assistant to learn", "none")


def _prompt_problems(path: str, value: object, format: Format) -> Iterator[Problem]:
    if not format.is_conversational:
        yield from _text_problems(path, value, "empty prompt")
        return
    problems = list(_conversation_problems(path, value))
    yield from problems
    if not problems and _roles(value)[-1] not in ("user", "tool"):
        yield Problem("no question", path, "a prompt that ends with user or tool", f"{_roles(value)[-1]} at the end")


def _completion_problems(path: str, value: object, format: Format) -> Iterator[Problem]:
    if not format.is_conversational:
        yield from _text_problems(path, value, "empty completion")
        return
    problems = list(_conversation_problems(path, value))
    yield from problems
    roles = [] if problems else _roles(value)
    if roles and (roles[0], roles[-1]) != ("assistant", "assistant"):
        expected = "a completion that begins and ends with the assistant"
        yield Problem("wrong role", path, expected, f"{roles[0]} ... {roles[-1]}")


def _label_problems(path: str, value: object) -> Iterator[Problem]:
    if not isinstance(value, bool):
        yield Problem("wrong type", path, "true or false", described(value))


def _score_problems(path: str, value: object) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield Problem("wrong type", path, "a finite number", described(value))


def _judged_list_problems(
    completions: object,
    name: str,
    values: object,
    check: Callable[[str, object], Iterator[Problem]],
    format: Format,
) -> Iterator[Problem]:
    """Faults of a list of completions, or steps, with one label, score or rank for each."""
    for column, value in (("completions", completions), (name, values)):
        if not isinstance(value, list | tuple) or not value:
            yield Problem("wrong type", f"/{column}", "a list that is not empty", described(value))
            return
    assert isinstance(completions, list | tuple)
    assert isinstance(values, list | tuple)
    if len(completions) != len(values):
        expected = f"one {name.removesuffix('s')} per completion, {len(completions)}"
        yield Problem("wrong length", f"/{name}", expected, f"{len(values)} {name}")
    for i, completion in enumerate(completions):
        yield from _completion_problems(f"/completions/{i}", completion, format)
    judged = [problem for i, value in enumerate(values) for problem in check(f"/{name}/{i}", value)]
    yield from judged
    if name != "labels" and not judged and len(set(values)) == 1:
        yield Problem("equal scores", f"/{name}", "completions of which one is better", f"{len(values)} alike")


def _tools_problems(tools: object) -> Iterator[Problem]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            yield Problem("invalid JSON", "/tools", "a JSON list of tools", str(error))
            return
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        yield Problem("wrong type", "/tools", "a list of JSON schemas", described(tools))
        return
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            yield Problem("wrong type", f"/tools/{i}", "an object (a tool's JSON schema)", described(tool))


def _verl_problems(row: Row) -> Iterator[Problem]:
    judged = row.get("reward_model")
    if isinstance(judged, Mapping) and judged.get("style") == "rule" and judged.get("ground_truth") is None:
        path = "/reward_model/ground_truth"
        yield Problem("missing column", path, "the answer that a rule compares with", "null")


def _roles(messages: object) -> list[str]:
    assert isinstance(messages, list | tuple)
    return [message["role"] for message in messages]


def _question_digest(row: Row, format: Format) -> bytes:
    value = row[format.columns[0]]
    if format.columns == MESSAGES.columns:
        last = max((i for i, role in enumerate(_roles(value)) if role == "assistant"), default=len(value))
        value = value[:last]
    elif format.columns == TEXT.columns or isinstance(value, str):
        value = value.strip()
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()
