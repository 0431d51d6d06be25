"""Preferences ready to train a reward model: token ids of a prompt's completions, and which is better than which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastrl.data.check import Rejected
from fastrl.data.formats import PREFERENCE, RANKED, SCORED, Format
from fastrl.data.problems import DataError, Problem, described
from fastrl.data.readers import Row
from fastrl.data.tokenize import encode_prompt_completion
from fastrl.losses.reward_model import ranked_pairs
from fastrl.train.config import RewardConfig
from fastrl.train.prompts import load_rows, set_aside


@dataclass(frozen=True, slots=True)
class Ranking:
    """The completions of one prompt.

    Attributes:
        ids: [K] token ids of prompt and completion, up to the token that ends the answer: its score is read there.
        pairs: (better, worse) places in `ids`.
        margin: how far apart the scores of a pair should be.
    """

    ids: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    margin: float = 0.0


def load_rankings(
    path: str, tokenizer: Any, config: RewardConfig, *, context: int | None, output_dir: str | None
) -> list[Ranking]:
    """Read a file of preference, scored or ranked rows and encode it.

    Args:
        context: most tokens the model takes; None is no limit.
        output_dir: where `rejected.jsonl` goes; None writes nothing.

    Raises:
        DataError: bad rows, equal completions in a pair, a margin that is no number, rows that are too long.
    """
    rows, format = load_rows(path, config.data, (PREFERENCE, SCORED, RANKED), output_dir=output_dir)
    encoded: list[Ranking] = []
    refused: list[Rejected] = []
    for index, row in enumerate(rows):
        try:
            encoded.append(_ranking(tokenizer, row, format, config, context))
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.at(rows.place(index)).problems))
    set_aside(refused, config.data, output_dir=output_dir, is_all=not encoded)
    return encoded


def encoded_at(tokenizer: Any, prompt: Any, completion: Any, *, path: str, tools: Any = None) -> tuple[int, ...]:
    """Token ids of a prompt and its completion up to the token that ends the answer.

    What a chat template writes after that token is left out, as a sampled completion does not have it.

    Args:
        path: JSON pointer of the completion, for the error.
    """
    try:
        ids, is_completion = encode_prompt_completion(tokenizer, prompt, completion, tools=tools)
    except DataError as error:
        raise DataError([replace(problem, path=problem.path or path) for problem in error.problems]) from error
    end = max(i for i, is_trained in enumerate(is_completion) if is_trained)
    return ids[: end + 1]


def refuse_long(n: int, *, max_length: int | None, context: int | None, path: str) -> None:
    """Refuse n tokens that the run or the model does not take.

    Raises:
        DataError: more than `max_length` or than the model's context.
    """
    if max_length is not None and n > max_length:
        raise DataError([Problem("too long", path, f"at most max_length = {max_length} tokens (raise it)", str(n))])
    if context is not None and n > context:
        raise DataError([Problem("too long", path, f"at most the {context} tokens of the model's context", str(n))])


def _ranking(tokenizer: Any, row: Row, format: Format, config: RewardConfig, context: int | None) -> Ranking:
    is_pair = format.columns == PREFERENCE.columns
    names = ["/chosen", "/rejected"] if is_pair else [f"/completions/{i}" for i in range(len(row["completions"]))]
    completions = [row["chosen"], row["rejected"]] if is_pair else row["completions"]
    ids = []
    for name, completion in zip(names, completions, strict=True):
        each = encoded_at(tokenizer, row["prompt"], completion, path=name, tools=row.get("tools"))
        refuse_long(len(each), max_length=config.max_length, context=context, path=name)
        ids.append(each)
    total, budget = sum(map(len, ids)), config.packing.token_budget
    if total > budget:
        expected = f"at most packing.token_budget = {budget} tokens in all completions, which share a batch (raise it)"
        raise DataError([Problem("too long", names[-1].rsplit("/", 1)[0], expected, str(total))])
    pairs = [(0, 1)] if is_pair else _pairs(row, format)
    for better, worse in pairs:
        if ids[better] == ids[worse]:
            expected = f"another text than {names[better]}"
            raise DataError([Problem("equal completions", names[worse], expected, "the same")])
    return Ranking(tuple(ids), tuple(pairs), _margin(row, is_pair=is_pair))


def _pairs(row: Row, format: Format) -> list[tuple[int, int]]:
    quality = row["scores"] if format.columns == SCORED.columns else [-rank for rank in row["ranks"]]
    return [(better, worse) for better, worse in ranked_pairs(torch.tensor(quality, dtype=torch.float64)).tolist()]


def _margin(row: Row, *, is_pair: bool) -> float:
    """A pair's margin: the column of that name; absent or null is 0."""
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if not is_pair:
        expected = "no margin beside a list (its scores say the order alone; rename the column)"
        raise DataError([Problem("extra column", "/margin", expected, described(margin))])
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError([Problem("wrong type", "/margin", "a finite number", described(margin))])
    return float(margin)


def n_tokens(rows: Sequence[Ranking]) -> int:
    """Tokens of all completions, each with its prompt."""
    return sum(len(ids) for row in rows for ids in row.ids)
