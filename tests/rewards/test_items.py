from __future__ import annotations

import pytest

from fastrl.rewards import Reward, check_rewards, sequence_equality, set_equality


@pytest.mark.parametrize(
    ("text", "as_set", "as_sequence"),
    [
        ("red, 2, blue", 1.0, 1.0),
        ("blue; red; 2.0", 1.0, 0.0),
        ("red, 2, blue, red", 1.0, 0.0),
        ('["red", 2, "blue"]', 1.0, 1.0),
        ("['red', 2, 'blue']", 1.0, 1.0),
        ("{blue, 2, red}", 1.0, 0.0),
        ("- red\n- 2\n- blue", 1.0, 1.0),
        ("1. red\n2. 2\n3. blue", 1.0, 1.0),
        ("<think>green</think><answer>red,2,blue</answer>", 1.0, 1.0),
        ("red, 2", 0.0, 0.0),
        ("red, 2, blue, green", 0.0, 0.0),
        ("Red, 2, blue", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("[" * 5000, 0.0, 0.0),
        ("<think>red, 2, blue", 0.0, 0.0),
    ],
)
def test_items_are_compared_as_a_set_and_as_a_sequence(text: str, as_set: float, as_sequence: float) -> None:
    gold = [["red", 2, "blue"]]
    assert set_equality([text], answer=gold) == [as_set]
    assert sequence_equality([text], answer=gold) == [as_sequence]


def test_an_answer_without_items_would_reward_silence_and_is_refused() -> None:
    assert set_equality(["a, b"], answer=["b, a"]) == [1.0]
    for gold in ([], "", 3):
        with pytest.raises(ValueError, match="need an answer with items"):
            check_rewards([Reward(set_equality)], {"answer": [gold]})
