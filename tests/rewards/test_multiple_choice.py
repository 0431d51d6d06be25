from __future__ import annotations

import pytest

from fastrl.rewards import Reward, check_rewards, multiple_choice
from fastrl.rewards.multiple_choice import letter_in


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("B. Paris", "B"),
        ("B) because A is wrong", "B"),
        ("<think>A? No.</think><answer>E</answer>", "E"),
        ("The answer is (B).", "B"),
        ("First I thought the answer is A. The final answer is: **C**", "C"),
        ("Answer: option D", "D"),
        ("the answer is b", "B"),
        (r"So \boxed{C}, not (A).", "C"),
        (r"\boxed{\text{(E)}}", "E"),
        ("Of (A), (B) and (D) the last holds: (D) it is", "D"),
    ],
)
def test_the_letter_is_read_from_the_strongest_statement_and_its_last_occurrence(text: str, letter: str) -> None:
    assert letter_in(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat sat down",
        "the answer is a matter of taste",
        "<think>the answer is (B)",
        "F",
        "Eve",
        "The answer is Bob",
    ],
)
def test_words_and_unfinished_thoughts_choose_nothing(text: str) -> None:
    assert letter_in(text) is None


def test_a_right_letter_is_one_and_all_else_nothing() -> None:
    assert multiple_choice(["B", "C", "?"], answer=["B", "(b)", "a"]) == [1.0, 0.0, 0.0]


def test_a_gold_answer_that_is_no_letter_is_found_before_training() -> None:
    with pytest.raises(ValueError, match=r"cannot judge 1 of 2 rows; the first is row 2: .* letter from A to E"):
        check_rewards([Reward(multiple_choice)], {"answer": ["A", "7"]})
