"""Prompts ready to sample: token ids beside the text and the columns that rewards read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data.check import Rejected, check_rows, split_rows
from fastrl.data.formats import PROMPT, Format
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Indexable, Rows, read_rows
from fastrl.data.template import apply_templates
from fastrl.data.tokenize import render_prompt
from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import check_rewards
from fastrl.train.config import DataBlock


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of prompt data.

    Attributes:
        ids: token ids, the generation prompt included.
        prompt: the text, or the list of messages, as the reward functions see it.
        columns: the row's other columns, passed to the reward functions.
    """

    ids: tuple[int, ...]
    prompt: str | list[dict[str, Any]]
    columns: Mapping[str, Any]


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Turn rows into TRL's keyword columns: name -> one value per prompt, None where a row lacks it."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def load_rows(
    source: str | Indexable, data: DataBlock, formats: Sequence[Format], *, output_dir: str | None
) -> tuple[Rows, Format]:
    """Read, template and check a data file as the configuration's `data` block says.

    With `skip_bad_rows`, refused rows go to `rejected.jsonl` in output_dir, each with its place and reasons.

    Raises:
        DataError: rows that cannot be trained on: the first twenty, and the counts by class.
    """
    rows = apply_templates(
        read_rows(source, columns=data.columns, max_rows=data.max_rows),
        prompt_template=data.prompt_template,
        completion_template=data.completion_template,
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
    )
    if data.skip_bad_rows:
        rows, rejected = split_rows(rows, formats)
        if rejected:
            _write_rejected(rejected, Path(output_dir or "."))
    return rows, check_rows(rows, formats)


def load_prompts(
    source: str | Indexable,
    tokenizer: Any,
    data: DataBlock,
    rewards: Sequence[Reward],
    *,
    max_prompt_length: int | None,
    output_dir: str | None,
) -> list[Prompt]:
    """Read prompts, render them to token ids, and check that every reward can judge every row.

    Args:
        source: a file, or any table of rows.
        rewards: those of the run; empty when nothing is judged.
        max_prompt_length: prompts with more tokens are refused.
        output_dir: where `rejected.jsonl` goes.

    Raises:
        DataError: bad rows, or prompts that are too long, with their places.
        ValueError: a column that a reward needs is missing, or a gold answer cannot be judged.
    """
    rows, _ = load_rows(source, data, (PROMPT,), output_dir=output_dir)
    prompts, too_long = [], []
    for index, row in enumerate(rows):
        ids = render_prompt(tokenizer, row["prompt"], tools=row.get("tools"), place=rows.place(index))
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            expected = f"at most rollout.max_prompt_length = {max_prompt_length} tokens"
            too_long.append(Problem("prompt too long", "/prompt", expected, str(len(ids)), rows.place(index)))
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompts.append(Prompt(ids, row["prompt"], columns))
    if too_long:
        raise DataError(too_long)
    if rewards:
        check_rewards(rewards, columns_of(prompts))
    return prompts


def _write_rejected(rejected: Sequence[Rejected], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"place": each.place, "reasons": [str(problem) for problem in each.problems], "row": each.row})
        for each in rejected
    ]
    (folder / "rejected.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
