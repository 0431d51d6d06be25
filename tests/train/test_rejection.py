"""Which completions become rows, on numbers a reader can check."""

from __future__ import annotations

from fastrl.train.rejection import Candidate, preference_rows, sft_rows, unpaired_rows

CANDIDATES = [
    Candidate("a", "a", 1.0, True),
    Candidate("b", "b", 0.0, True),
    Candidate("c", "c", 2.0, True),
    Candidate(" a", " a", 1.0, True),  # the first again, but for a space
    Candidate("d", "d", None, True),  # no verdict
    Candidate("e", "e", 2.0, False),  # cut off
    Candidate("f", "f", -1.0, True),
    Candidate(" ", " ", 3.0, True),  # nothing to learn from
]


def test_supervised_rows_are_the_distinct_passing_ones_best_first() -> None:
    assert [row["completion"] for row in sft_rows("p", CANDIDATES, 1.0, None)] == ["c", "a"]
    assert sft_rows("p", CANDIDATES, -5.0, 1) == [{"prompt": "p", "completion": "c", "reward": 2.0}]
    assert sft_rows("p", CANDIDATES, 3.0, None) == []


def test_pairs_join_the_best_passing_with_the_worst_failing() -> None:
    pairs = [(row["chosen"], row["rejected"]) for row in preference_rows("p", CANDIDATES, 1.0, None)]
    assert pairs == [("c", "f"), ("a", "b")]
    assert preference_rows("p", CANDIDATES, 2.0, 1) == [
        {"prompt": "p", "chosen": "c", "rejected": "f", "chosen_reward": 2.0, "rejected_reward": -1.0}
    ]
    assert preference_rows("p", CANDIDATES, -1.0, None) == []


def test_labels_say_what_passed_in_the_order_drawn() -> None:
    rows = unpaired_rows("p", CANDIDATES, 1.0, None)
    assert [(row["completion"], row["label"]) for row in rows] == [("a", True), ("b", False), ("c", True), ("f", False)]
