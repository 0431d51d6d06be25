"""Prompts from rows: ids, columns, templates, and rows that are refused or set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.problems import DataError
from fastrl.recipes.sorting import make_tokenizer
from fastrl.rewards.resolve import resolve_rewards
from fastrl.train.config import DataBlock
from fastrl.train.prompts import Prompt, columns_of, load_prompts

TOKENIZER = make_tokenizer()
SKIPPING = DataBlock(skip_bad_rows=True)


def load(rows: Any, data: DataBlock = DataBlock(), **options: Any) -> list[Prompt]:  # noqa: B008
    options = {"max_prompt_length": None, "output_dir": None, "rewards": (), **options}
    return load_prompts(rows, TOKENIZER, data, **options)


def test_a_prompt_keeps_its_text_for_the_rewards_and_its_other_columns() -> None:
    (text,) = load([{"prompt": "102", "answer": "3", "level": 1}])
    assert TOKENIZER.decode(text.ids) == "102"
    assert text.columns == {"answer": "3", "level": 1}
    (chat,) = load([{"prompt": [{"role": "user", "content": "102"}]}])
    assert TOKENIZER.decode(chat.ids) == "<|user|>102<|assistant|>"
    assert chat.prompt == [{"role": "user", "content": "102"}]


def test_the_data_block_is_applied_before_rendering() -> None:
    data = DataBlock(columns={"prompt": "question"}, apply_chat_template=True, max_rows=1)
    (prompt,) = load([{"question": "102"}, {"question": "304"}], data)
    assert TOKENIZER.decode(prompt.ids) == "<|user|>102<|assistant|>"
    (prompt,) = load([{"a": "1", "b": "2"}], DataBlock(prompt_template="{a}0{b}"))
    assert TOKENIZER.decode(prompt.ids) == "102"
    (prompt,) = load([{"prompt": [{"role": "user", "content": "1"}]}], DataBlock(system_prompt="9"))
    assert TOKENIZER.decode(prompt.ids) == "<|user|>9<|user|>1<|assistant|>"


def test_columns_line_up_and_a_row_that_lacks_one_has_none() -> None:
    prompts = [Prompt((1,), "a", {"x": 1}), Prompt((1,), "b", {"y": 2})]
    assert columns_of(prompts) == {"x": [1, None], "y": [None, 2]}


def test_prompts_that_are_too_long_are_all_named() -> None:
    rows = [{"prompt": "1" * n} for n in (3, 9, 4, 8)]
    with pytest.raises(DataError, match="2 problems") as refused:
        load(rows, max_prompt_length=4)
    assert "row" not in str(refused.value).splitlines()[1]
    assert [problem.got for problem in refused.value.problems] == ["9", "8"]


def test_refused_rows_go_to_one_file_once_and_to_none_without_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "1"}, {"prompt": 2}, {"prompt": "3" * 9}]
    for output_dir in (None, str(tmp_path / "run"), str(tmp_path / "run")):
        assert [prompt.prompt for prompt in load(rows, SKIPPING, output_dir=output_dir, max_prompt_length=4)] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [each["row"] for each in rejected] == [{"prompt": 2}, {"prompt": "3" * 9}]
    assert [each["place"].rpartition(":")[2] for each in rejected] == ["2", "3"]
    assert capsys.readouterr().err.count("skipped 1 bad rows") == 6


def test_a_file_of_bad_rows_alone_is_an_error_also_when_they_may_be_skipped() -> None:
    with pytest.raises(DataError, match="at most"):
        load([{"prompt": "1234"}], SKIPPING, max_prompt_length=2)


def test_a_reward_that_lacks_its_column_stops_the_run_before_it_begins() -> None:
    rewards = resolve_rewards(("exact_match",))
    with pytest.raises(ValueError, match="answer"):
        load([{"prompt": "102"}], rewards=rewards)
    assert len(load([{"prompt": "102", "answer": "3"}], rewards=rewards)) == 1
