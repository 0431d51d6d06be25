"""Preferred, judged and ranked completions ready to train: token ids within the run's limits.

Every file is read, checked and encoded whole before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from transformers import AutoConfig

from fastrl.data.check import Rejected
from fastrl.data.formats import PREFERENCE, RANKED, SCORED, UNPAIRED, Format
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Row
from fastrl.data.tokenize import encode_prompt_completion
from fastrl.train.config import PreferenceConfig
from fastrl.train.prompts import load_rows, set_aside
from fastrl.train.supervised import Example

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, of which one was preferred."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True, slots=True)
class Judged:
    """A completion that somebody would have wanted, or not."""

    example: Example
    is_desirable: bool


@dataclass(frozen=True, slots=True)
class Ranked:
    """Completions of one prompt with their scores; higher is better."""

    examples: tuple[Example, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Item]):
    """What a file holds, and how many of its sequences were cut to `max_length`."""

    rows: list[Item]
    n_truncated: int


def load_pairs(path: str, tokenizer: Any, config: PreferenceConfig, *, output_dir: str | None) -> Loaded[Pair]:
    """Read preference rows: prompt, chosen, rejected; the prompt may be implicit.

    Args:
        output_dir: where `rejected.jsonl` goes; None writes nothing.

    Raises:
        DataError: bad rows; equal answers; sequences over a limit without `truncate`; pairs over the token budget.
    """

    def items(row: Row, format: Format, encode: Encode) -> list[Pair]:
        return [_pair(row, encode)]

    return _loaded(path, (PREFERENCE,), tokenizer, config, output_dir, items, lambda pair: (pair.chosen, pair.rejected))


def load_judged(path: str, tokenizer: Any, config: PreferenceConfig, *, output_dir: str | None) -> Loaded[Judged]:
    """Read unpaired rows: prompt, completion, label. A preference row is one desirable and one undesirable completion.

    Args and raises as `load_pairs`.
    """

    def items(row: Row, format: Format, encode: Encode) -> list[Judged]:
        if format.columns == UNPAIRED.columns:
            return [Judged(encode("completion", row["completion"]), row["label"])]
        pair = _pair(row, encode)
        return [Judged(pair.chosen, True), Judged(pair.rejected, False)]

    return _loaded(path, (UNPAIRED, PREFERENCE), tokenizer, config, output_dir, items, lambda item: (item.example,))


def load_ranked(path: str, tokenizer: Any, config: PreferenceConfig, *, output_dir: str | None) -> Loaded[Ranked]:
    """Read scored or ranked rows: prompt, completions, and scores or ranks. A preference row scores 1 and 0.

    Args and raises as `load_pairs`.
    """

    def items(row: Row, format: Format, encode: Encode) -> list[Ranked]:
        if format.columns == PREFERENCE.columns:
            pair = _pair(row, encode)
            return [Ranked((pair.chosen, pair.rejected), (1.0, 0.0))]
        examples = tuple(encode(f"completions/{i}", text) for i, text in enumerate(row["completions"]))
        is_rank = format.columns == RANKED.columns
        scores = tuple(-float(rank) for rank in row["ranks"]) if is_rank else tuple(map(float, row["scores"]))
        _check_one_score_each(examples, scores)
        return [Ranked(examples, scores)]

    formats = (SCORED, RANKED, PREFERENCE)
    return _loaded(path, formats, tokenizer, config, output_dir, items, lambda item: item.examples)


def longest_sequence(config: PreferenceConfig) -> int:
    """Most tokens a sequence of the run may have: by max_length, the model's context and the token budget."""
    limits = [config.packing.token_budget + 1]  # the last token is predicted, never fed
    if config.max_length is not None:
        limits.append(config.max_length)
    if (context := context_of(config)) is not None:
        limits.append(context)
    return min(limits)


def context_of(config: PreferenceConfig) -> int | None:
    """Most tokens the model holds, from its configuration alone; None when that names no limit."""
    found = AutoConfig.from_pretrained(
        config.model_name_or_path, local_files_only=True, trust_remote_code=config.trust_remote_code
    )
    context: int | None = getattr(found.get_text_config(), "max_position_embeddings", None)
    return context


Encode = Callable[[str, Any], Example]  # (name of the field, completion) -> its tokens after the row's prompt


def _loaded(
    path: str,
    formats: Sequence[Format],
    tokenizer: Any,
    config: PreferenceConfig,
    output_dir: str | None,
    items_of: Callable[[Row, Format, Encode], list[Item]],
    sequences_of: Callable[[Item], Sequence[Example]],
) -> Loaded[Item]:
    """Encode every row; those that cannot be trained are dealt with as `data.skip_bad_rows` says."""
    rows, format = load_rows(path, config.data, formats, output_dir=output_dir)
    context = context_of(config)
    items: list[Item] = []
    refused: list[Rejected] = []
    n_truncated = 0
    for index, row in enumerate(rows):
        cut: list[bool] = []

        def encode(field: str, completion: Any, row: Row = row, cut: list[bool] = cut) -> Example:
            example, is_cut = _encoded(tokenizer, row, field, completion, config, context)
            cut.append(is_cut)
            return example

        try:
            made = items_of(row, format, encode)
            for item in made:
                _check_budget(sequences_of(item), config)
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.at(rows.place(index)).problems))
            continue
        items += made
        n_truncated += sum(cut)
    set_aside(refused, config.data, output_dir=output_dir, is_all=not items)
    return Loaded(items, n_truncated)


def _encoded(
    tokenizer: Any, row: Row, field: str, completion: Any, config: PreferenceConfig, context: int | None
) -> tuple[Example, bool]:
    """One completion after its prompt, within the limits, and whether it was cut."""
    try:
        ids, mask = encode_prompt_completion(tokenizer, row["prompt"], completion, tools=row.get("tools"))
    except DataError as error:
        raise DataError([replace(problem, path=problem.path or f"/{field}") for problem in error.problems]) from error
    n, n_prompt = len(ids), mask.index(True)
    if context is not None and n_prompt >= context:
        expected = f"fewer tokens than the model's context of {context}"
        raise _refused("/prompt", "prompt too long", expected, str(n_prompt))
    name, limit = "the model's context", context
    if config.max_length is not None and (context is None or config.max_length <= context):
        name, limit = "max_length", config.max_length
    if limit is None or n <= limit:
        return Example(ids, mask), False
    if not config.truncate:
        expected = f"at most {name} = {limit} tokens with the prompt (raise it, or pass --truncate true)"
        raise _refused(f"/{field}", "row too long", expected, str(n))
    if not any(mask[:limit]):
        expected = f"tokens to train on in the first {limit} ({name})"
        raise _refused(f"/{field}", "nothing left to train on", expected, "none")
    return Example(ids[:limit], mask[:limit]), True


def _pair(row: Row, encode: Encode) -> Pair:
    pair = Pair(encode("chosen", row["chosen"]), encode("rejected", row["rejected"]))
    if pair.chosen.ids == pair.rejected.ids:
        raise _refused("/rejected", "equal completions", "other tokens than chosen (after cutting)", "the same")
    return pair


def _check_one_score_each(examples: Sequence[Example], scores: Sequence[float]) -> None:
    """A completion cannot be better than itself; the same one twice with the same score is no contradiction."""
    first: dict[tuple[int, ...], int] = {}
    for i, example in enumerate(examples):
        place = first.setdefault(tuple(example.ids), i)
        if scores[place] != scores[i]:
            expected = f"other tokens than /completions/{place} (after cutting), whose score differs"
            raise _refused(f"/completions/{i}", "equal completions", expected, "the same")


def _check_budget(examples: Sequence[Example], config: PreferenceConfig) -> None:
    """What is learned together is packed together."""
    positions, budget = sum(len(example.ids) - 1 for example in examples), config.packing.token_budget
    if positions > budget:
        expected = f"at most packing.token_budget = {budget} positions for what is learned together (raise it)"
        raise _refused("", "row too long", expected, str(positions))


def _refused(path: str, kind: str, expected: str, got: str) -> DataError:
    return DataError([Problem(kind, path, expected, got)])
