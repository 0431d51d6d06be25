"""Prompts ready to sample: token ids beside the text and the columns that rewards read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data.check import Rejected, check_rows, split_rows
from fastrl.data.formats import PREFERENCE, PROMPT, Format
from fastrl.data.implicit_prompt import with_prompt
from fastrl.data.problems import DataError, Problem
from fastrl.data.readers import Indexable, Rows, read_rows
from fastrl.data.template import apply_templates
from fastrl.data.tokenize import render_prompt
from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import check_rewards
from fastrl.train.config import DataBlock
from fastrl.train.distributed import is_first

REJECTED_FILE = "rejected.jsonl"


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

    With `skip_bad_rows`, refused rows are set aside as in `set_aside`.

    Raises:
        DataError: rows that cannot be trained on: the first twenty, and the counts by class.
    """
    rows = read_rows(source, columns=data.columns, max_rows=data.max_rows)
    if PREFERENCE in formats and data.prompt_template is None:
        rows = rows.map(with_prompt)
    rows = apply_templates(
        rows,
        prompt_template=data.prompt_template,
        completion_template=data.completion_template,
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
    )
    if data.skip_bad_rows:
        rows, rejected = split_rows(rows, formats)
        set_aside(rejected, data, output_dir=output_dir)
    return rows, check_rows(rows, formats)


def load_prompts(
    source: str | Indexable,
    tokenizer: Any,
    data: DataBlock,
    rewards: Sequence[Reward],
    *,
    max_prompt_length: int | None,
    output_dir: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Prompt]:
    """Read prompts, render them to token ids, and check that every reward can judge every row.

    Args:
        source: a file, or any table of rows.
        rewards: those of the run; empty when nothing is judged.
        max_prompt_length: prompts with more tokens are refused.
        output_dir: where `rejected.jsonl` goes; None writes nothing.
        tools: schemas of the run's tools, which every prompt is rendered with; prompts must then be messages, and
            rows have no tools of their own.

    Raises:
        DataError: bad rows, or prompts that are too long, with their places.
        ValueError: a column that a reward needs is missing, or a gold answer cannot be judged.
    """
    rows, _ = load_rows(source, data, (PROMPT,), output_dir=output_dir)
    prompts: list[Prompt] = []
    refused: list[Rejected] = []
    for index, row in enumerate(rows):
        try:
            if tools is not None:
                _check_agent_row(row, rows.place(index))
            ids = render_prompt(tokenizer, row["prompt"], tools=tools or row.get("tools"), place=rows.place(index))
            if max_prompt_length is not None and len(ids) > max_prompt_length:
                expected = f"at most rollout.max_prompt_length = {max_prompt_length} tokens"
                raise DataError([Problem("prompt too long", "/prompt", expected, str(len(ids)), rows.place(index))])
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.problems))
            continue
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompts.append(Prompt(ids, row["prompt"], columns))
    set_aside(refused, data, output_dir=output_dir, is_all=not prompts)
    if rewards:
        check_rewards(rewards, columns_of(prompts))
    return prompts


def _check_agent_row(row: Mapping[str, Any], place: str) -> None:
    """Refuse a row to which the run's tools cannot be shown."""
    if isinstance(row["prompt"], str):
        expected = "messages, as tools are shown by a chat template; set data.apply_chat_template"
        raise DataError([Problem("plain prompt", "/prompt", expected, "text", place)])
    if row.get("tools"):
        raise DataError([Problem("tools of a row", "/tools", "no tools beside the environment's", "some", place)])


def set_aside(rejected: Sequence[Rejected], data: DataBlock, *, output_dir: str | None, is_all: bool = False) -> None:
    """Deal with refused rows as `data.skip_bad_rows` says: raise, or write them down and go on.

    Each goes to `rejected.jsonl` once, with its place and the reasons, also when a run is resumed or reads two files.

    Args:
        output_dir: None writes nothing, as a dry run must; the number is printed to standard error either way. Of
            several ranks, which all read the same file, the first prints and writes.
        is_all: nothing is left without them.

    Raises:
        DataError: there are refused rows, and they may not be skipped or none would be left.
    """
    if not rejected:
        return
    if is_all or not data.skip_bad_rows:
        raise DataError([problem for each in rejected for problem in each.problems])
    if not is_first():
        return
    print(f"skipped {len(rejected)} bad rows, the first: {rejected[0].problems[0]}", file=sys.stderr)
    if output_dir is None:
        return
    path = Path(output_dir) / REJECTED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
    lines = [
        json.dumps({"place": each.place, "reasons": [str(problem) for problem in each.problems], "row": each.row})
        for each in rejected
    ]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines if line not in known)
