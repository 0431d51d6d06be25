from __future__ import annotations

import pytest

from fastrl.data import (
    FORMATS,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    PROMPT_COMPLETION,
    RANKED,
    SCORED,
    STEPWISE,
    TEXT,
    UNPAIRED,
    DataError,
    detect_format,
    read_rows,
)

CHAT = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "a"}, TEXT),
        ({"messages": CHAT}, MESSAGES),
        ({"prompt": "q", "answer": "4"}, PROMPT),
        ({"prompt": "q", "completion": "a"}, PROMPT_COMPLETION),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PREFERENCE),
        ({"prompt": "q", "completion": "a", "label": True}, UNPAIRED),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, STEPWISE),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [0, 1]}, SCORED),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [2, 1]}, RANKED),
        ({"prompt": "q", "messages": None, "completion": None}, PROMPT),
    ],
)
def test_the_columns_name_the_format(row, format):
    assert detect_format(read_rows([row])) == format


def test_a_prompt_of_messages_makes_the_format_conversational():
    format = detect_format(read_rows([{"prompt": CHAT}]))
    assert format.columns == PROMPT.columns
    assert format.is_conversational


def test_the_caller_limits_the_formats():
    rows = read_rows([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert detect_format(rows, among=(PROMPT,)) == PROMPT


def test_columns_of_two_formats_are_ambiguous():
    with pytest.raises(DataError, match=r"list:1: expected columns of one format, not of text \| prompt, completion"):
        detect_format(read_rows([{"text": "a", "prompt": "q", "completion": "b"}]))


def test_columns_of_no_format_are_listed_beside_those_that_would_do():
    with pytest.raises(DataError, match=r"columns text \| messages .*rename.*, got columns 'answer', 'question'"):
        detect_format(read_rows([{"question": "q", "answer": "a"}]), among=(TEXT, MESSAGES))


def test_the_first_readable_row_decides():
    assert detect_format(read_rows([7, {"text": "a"}])) == TEXT
    with pytest.raises(DataError, match="2 unreadable ones; list:1: expected an object"):
        detect_format(read_rows([7, 8]))
    with pytest.raises(DataError, match="list: expected at least one row, got none"):
        detect_format(read_rows([]))


def test_names_and_columns_of_the_formats_differ():
    assert len({format.name for format in FORMATS}) == len({format.columns for format in FORMATS}) == 9
