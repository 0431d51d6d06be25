"""Rows of on-policy distillation: prompts that somebody completes, and the data's completions where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrl.data.check import Rejected
from fastrl.data.formats import PROMPT, PROMPT_COMPLETION
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row
from fastrl.data.tokenize import encode_prompt_completion, render_prompt
from fastrl.train.config import GKDConfig
from fastrl.train.prompts import load_rows, set_aside
from fastrl.train.supervised import Example


@dataclass(frozen=True, slots=True)
class GKDRow:
    """One row.

    Attributes:
        prompt_ids: what is fed before sampling.
        example: the prompt with the data's completion; None where rows are read for their prompts alone.
    """

    prompt_ids: tuple[int, ...]
    example: Example | None


def load_gkd_rows(
    path: str,
    tokenizer: Any,
    config: GKDConfig,
    *,
    with_completions: bool,
    output_dir: str | None,
    context: int | None,
) -> list[GKDRow]:
    """Read a file of prompt-completion rows, or of prompts, and encode it.

    Args:
        with_completions: the rows must have completions.
        output_dir: where `rejected.jsonl` goes; None writes nothing.
        context: most tokens the student holds; None when its configuration does not say.

    Raises:
        DataError: bad rows, and prompts or rows that are too long, with their places.
    """
    format = PROMPT_COMPLETION if with_completions else PROMPT
    rows, _ = load_rows(path, config.data, (format,), output_dir=output_dir)
    found: list[GKDRow] = []
    refused: list[Rejected] = []
    for index, row in enumerate(rows):
        try:
            found.append(_encoded(row, tokenizer, config, rows.place(index), with_completions, context))
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.problems))
    set_aside(refused, config.data, output_dir=output_dir, is_all=not found)
    return found


def _encoded(
    row: Row, tokenizer: Any, config: GKDConfig, place: str, with_completions: bool, context: int | None
) -> GKDRow:
    tools, budget = row.get("tools"), config.packing.token_budget
    prompt = render_prompt(tokenizer, row["prompt"], tools=tools, place=place)
    limit = config.rollout.max_prompt_length
    if limit is not None and len(prompt) > limit:
        raise _too_long("prompt too long", f"at most rollout.max_prompt_length = {limit} tokens", prompt, place)
    if context is not None and len(prompt) >= context:
        raise _too_long("prompt too long", f"fewer than the model's context of {context} tokens", prompt, place)
    longest = len(prompt) + config.max_new_tokens
    if (longest if context is None else min(longest, context)) - 1 > budget:  # the last token is predicted, never fed
        expected = f"at most packing.token_budget + 1 - max_new_tokens = {budget + 1 - config.max_new_tokens} tokens"
        raise _too_long("prompt too long", expected, prompt, place)
    if not with_completions:
        return GKDRow(prompt, None)
    example = Example(*encode_prompt_completion(tokenizer, row["prompt"], row["completion"], tools=tools, place=place))
    if len(example.ids) - 1 > budget:
        raise _too_long("row too long", f"at most packing.token_budget + 1 = {budget + 1} tokens", example.ids, place)
    return GKDRow(prompt, example)


def _too_long(kind: str, expected: str, ids: tuple[int, ...], place: str) -> DataError:
    return DataError([Problem(kind, "", expected, str(len(ids)), place)])
