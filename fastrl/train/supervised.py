"""Supervised rows ready to train: token ids and the mask of what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrl.data.formats import MESSAGES, PROMPT_COMPLETION, TEXT, Format
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row
from fastrl.data.tokenize import encode_messages, encode_prompt_completion, encode_text
from fastrl.train.config import SFTConfig
from fastrl.train.prompts import load_rows


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


def load_examples(path: str, tokenizer: Any, config: SFTConfig) -> Examples:
    """Read a file of text, messages or prompt-completion rows and encode it.

    Raises:
        DataError: bad rows; rows over `max_length` without `truncate`; rows left with nothing to train on.
        ValueError: an option that does not fit the file's format.
    """
    rows, format = load_rows(path, config.data, (TEXT, MESSAGES, PROMPT_COMPLETION), output_dir=config.output_dir)
    if config.assistant_only_loss and format.columns == TEXT.columns:
        raise ValueError(f"assistant_only_loss needs conversations, and {rows.source} has plain text; leave it out")
    encoded, problems, n_truncated = [], [], 0
    limit = config.max_length
    for index, row in enumerate(rows):
        place = rows.place(index)
        ids, mask = _encode(tokenizer, row, format, config, place)
        if limit is not None and len(ids) > limit:
            if not config.truncate:
                expected = f"at most max_length = {limit} tokens (raise it, or pass --truncate true)"
                problems.append(Problem("row too long", "", expected, str(len(ids)), place))
                continue
            ids, mask, n_truncated = ids[:limit], mask[:limit], n_truncated + 1
            if not any(mask):
                expected = f"tokens to train on in the first {limit} (raise max_length)"
                problems.append(Problem("nothing left to train on", "", expected, "none", place))
                continue
        encoded.append(Example(ids, mask))
    if problems:
        raise DataError(problems)
    return Examples(encoded, n_truncated)


def _encode(
    tokenizer: Any, row: Row, format: Format, config: SFTConfig, place: str
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
