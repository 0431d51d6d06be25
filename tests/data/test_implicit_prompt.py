from __future__ import annotations

from typing import Any

import pytest

from fastrl.data import PREFERENCE, check_rows, read_rows, with_prompt
from fastrl.data.problems import DataError

USER = {"role": "user", "content": "2 + 2?"}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_common_messages_are_the_prompt_of_a_conversation() -> None:
    row = {"chosen": [USER, turn("4")], "rejected": [USER, turn("5")], "id": 7}
    assert with_prompt(row) == {"prompt": [USER], "chosen": [turn("4")], "rejected": [turn("5")], "id": 7}


def test_a_plain_copy_of_the_question_is_replaced_by_the_messages() -> None:
    row = {"prompt": "2 + 2?", "chosen": [USER, turn("4")], "rejected": [USER, turn("5")]}
    assert with_prompt(row)["prompt"] == [USER]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q: 6 x 7 = 42", "Q: 6 x 7 = 43", "Q: 6 x 7 ="),
        ("Human: hi\n\nBot: yes", "Human: hi\n\nBot: no", "Human: hi\n\nBot:"),
        ("Question?\nYes", "Question?\nNo", "Question?"),
        ("abX", "abY", "ab"),
    ],
)
def test_the_common_text_up_to_its_last_space_is_the_prompt(chosen: str, rejected: str, prompt: str) -> None:
    row = with_prompt({"chosen": chosen, "rejected": rejected})
    assert row["prompt"] == prompt
    assert prompt + row["chosen"] == chosen
    assert prompt + row["rejected"] == rejected


def test_a_row_with_a_prompt_stays_as_it_is() -> None:
    for row in (
        {"prompt": "a", "chosen": "x y", "rejected": "x z"},
        {"prompt": [USER], "chosen": [turn("x")], "rejected": [turn("y")]},
        {"prompt": "a", "completion": "b"},
    ):
        assert with_prompt(row) is row


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ({"chosen": "yes", "rejected": "no"}, "/prompt"),
        ({"chosen": "say yes", "rejected": "say yes"}, "/rejected"),
        ({"chosen": [USER, turn("4")], "rejected": [USER]}, "/rejected"),
        ({"chosen": [turn("4")], "rejected": [turn("5")]}, "/prompt"),
    ],
)
def test_rows_without_a_common_prompt_or_without_answers_are_refused(row: dict[str, Any], path: str) -> None:
    with pytest.raises(DataError, match=path):
        with_prompt(row)


def test_the_check_names_row_and_field_of_rows_without_a_prompt() -> None:
    rows = read_rows([{"chosen": "a b", "rejected": "a c"}, {"chosen": "x", "rejected": "y"}]).map(with_prompt)
    with pytest.raises(DataError, match="list:2:/prompt"):
        check_rows(rows, PREFERENCE)
