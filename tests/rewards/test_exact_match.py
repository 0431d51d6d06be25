from __future__ import annotations

import pytest

from fastrl.rewards import exact_match


def test_only_the_same_characters_score():
    completions = ["Paris", " Paris\n", "paris", "Paris.", "<think>Rome?</think><answer>Paris</answer>", "<think>Paris"]
    assert exact_match(completions, ["Paris"] * 6) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_numbers_are_compared_as_printed_and_messages_are_read():
    assert exact_match([[{"role": "assistant", "content": "18"}], "0.5"], [18, 0.5]) == [1.0, 1.0]


def test_an_answer_that_is_neither_text_nor_number_is_refused():
    with pytest.raises(ValueError, match="needs a string or a number as answer, got None"):
        exact_match(["x"], [None])
