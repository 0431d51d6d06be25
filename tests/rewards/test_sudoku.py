from __future__ import annotations

import pytest

from fastrl.rewards import Reward, check_rewards, sudoku
from fastrl.rewards.sudoku import box_shape

CLUES = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
SOLVED = "1234\n3412\n2143\n4321"  # its two middle columns may be exchanged against two rows: see the other one
OTHER = "1 2 4 3 | 4 3 1 2 | 3 1 2 4 | 2 4 3 1"


def test_any_solution_that_keeps_the_clues_counts_however_it_is_drawn() -> None:
    drawn = "| 1 2 | 3 4 |\n| 3 4 | 1 2 |\n|-----|\n| 2 1 | 4 3 |\n| 4 3 | 2 1 |"
    texts = [
        SOLVED,
        OTHER,
        drawn,
        f"<think>4444</think><answer>{SOLVED}</answer>",
        str([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]),
    ]
    assert sudoku(texts, [CLUES] * 5) == [1.0] * 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2143\n3412\n1234\n4321",  # a valid grid, but the first clue is gone
        "1234\n2341\n3412\n4123",  # rows and columns hold, boxes do not
        "1234\n3412\n2143\n4312",  # a column repeats
        "1234\n3412\n2143",
        "1234\n3412\n2143\n4321\n1",
        "1" * 16,
        f"<think>{SOLVED}",
    ],
)
def test_a_broken_rule_a_lost_clue_or_a_grid_of_another_size_scores_nothing(text: str) -> None:
    assert sudoku([text], [CLUES]) == [0.0]


def test_boxes_may_have_any_size() -> None:
    assert [box_shape(n) for n in (4, 6, 9, 12, 16, 5)] == [(2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (1, 5)]
    six = "123456 456123 231564 564231 312645 645312"
    assert sudoku([six, six], ["." * 36] * 2) == [1.0, 1.0]
    assert sudoku([six], ["0" * 36], box=[[3, 2]]) == [0.0]  # the same grid breaks boxes of 3 rows and 2 columns
    sixteen = [[(4 * (i % 4) + i // 4 + j) % 16 + 1 for j in range(16)] for i in range(16)]
    assert sudoku([str(sixteen)], [[[0] * 16] * 16]) == [1.0]


def test_puzzles_that_are_no_grid_or_contradict_themselves_are_found_before_training() -> None:
    for puzzle, reason in (
        ("123", "N x N puzzle"),
        ([[1, 5], [0, 0]], "N x N puzzle"),
        (7, "list of rows or a text"),
        ([[1, 1], [0, 0]], "a clue twice"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_rewards([Reward(sudoku)], {"puzzle": [puzzle]})
    with pytest.raises(ValueError, match="rows x columns = 4, got"):
        sudoku([SOLVED], [CLUES], box=[[3, 2]])
