"""Supervised rows ready to train: token ids and the mask of what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrl.data.check import Rejected
from fastrl.data.formats import MESSAGES, PROMPT_COMPLETION, TEXT, Format
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row
from fastrl.data.tokenize import encode_messages, encode_prompt_completion, encode_text
from fastrl.train.config import DistillConfig, SFTConfig, TeacherConfig
from fastrl.train.model_directory import context_length
from fastrl.train.prompts import load_rows, set_aside


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row; `is_trained[i]` says whether predicting ids[i] is trained."""

    ids: tuple[int, ...]
    is_trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded rows of a file, and how many were cut to `max_length`."""

    rows: list[Example]
    n_truncated: int


def load_examples(
    path: str, tokenizer: Any, config: SFTConfig | DistillConfig | TeacherConfig, *, output_dir: str | None
) -> Examples:
    """Read a file of text, messages or prompt-completion rows and encode it.

    Args:
        output_dir: where `rejected.jsonl` goes; None writes nothing.

    Raises:
        DataError: bad rows; rows over `max_length` without `truncate`; rows left with nothing to train on.
        ValueError: an option that does not fit the file's format.
    """
    rows, format = load_rows(path, config.data, (TEXT, MESSAGES, PROMPT_COMPLETION), output_dir=output_dir)
    context = context_length(config.model_name_or_path)
    if config.assistant_only_loss and format.columns != MESSAGES.columns:
        raise ValueError(
            f"assistant_only_loss needs rows with messages, and those of {rows.source} have "
            f"{' and '.join(format.columns)}; leave it out"
        )
    encoded: list[Example] = []
    refused: list[Rejected] = []
    n_truncated = 0
    for index, row in enumerate(rows):
        try:
            ids, mask = _encode(tokenizer, row, format, config, rows.place(index))
            example = _cut(Example(ids, mask), config, rows.place(index))
            if context is not None and len(example.ids) > context:
                expected = f"at most the {context} tokens of the model's context (shorten it, or lower max_length)"
                raise DataError([Problem("row too long", "", expected, str(len(example.ids)), rows.place(index))])
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.problems))
            continue
        n_truncated += len(example.ids) < len(ids)
        encoded.append(example)
    set_aside(refused, config.data, output_dir=output_dir, is_all=not encoded)
    return Examples(encoded, n_truncated)


def _cut(example: Example, config: SFTConfig | DistillConfig | TeacherConfig, place: str) -> Example:
    """The example within `max_length` and the token budget, or the reason why it is refused."""
    n, limit = len(example.ids), config.max_length
    if limit is not None and n > limit and config.truncate:
        example = Example(example.ids[:limit], example.is_trained[:limit])
        if not any(example.is_trained):
            expected = f"tokens to train on in the first {limit} (raise max_length)"
            raise DataError([Problem("nothing left to train on", "", expected, "none", place)])
    elif limit is not None and n > limit:
        expected = f"at most max_length = {limit} tokens (raise it, or pass --truncate true)"
        raise DataError([Problem("row too long", "", expected, str(n), place)])
    elif n - 1 > config.packing.token_budget:  # the last token is predicted, never fed
        expected = f"at most packing.token_budget + 1 = {config.packing.token_budget + 1} tokens (raise it)"
        raise DataError([Problem("row too long", "", expected, str(n), place)])
    return example


def _encode(
    tokenizer: Any, row: Row, format: Format, config: SFTConfig | DistillConfig | TeacherConfig, place: str
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    if format.columns == TEXT.columns:
        return encode_text(tokenizer, row["text"], place=place)
    tools = row.get("tools")
    if format.columns == MESSAGES.columns:
        return encode_messages(
            tokenizer, row["messages"], assistant_only=config.assistant_only_loss, tools=tools, place=place
        )
    ids, mask = encode_prompt_completion(tokenizer, row["prompt"], row["completion"], tools=tools, place=place)
    return (ids, mask) if config.completion_only_loss else (ids, (False, *[True] * (len(ids) - 1)))
