from __future__ import annotations

import pytest

from fastrl.rewards import Regex, Reward, check_rewards, regex, resolve_reward


def test_the_whole_answer_part_must_match() -> None:
    texts = ["2024-01-31", "on 2024-01-31", "<think>x</think><answer>2024-01-31</answer>", "<think>2024-01-31"]
    pattern = r"\d{4}-\d\d-\d\d"
    assert regex(texts, [pattern] * 4) == [1.0, 0.0, 1.0, 0.0]
    assert regex(["on 2024-01-31\nindeed"], [rf".*{pattern}.*"]) == [1.0]


def test_a_pattern_for_all_rows_is_an_option_of_the_spec() -> None:
    made = resolve_reward(r"regex(pattern='(yes|no)')")
    assert made == Regex("(yes|no)")
    assert made(["yes", "maybe", "no"]) == [1.0, 0.0, 1.0]
    assert resolve_reward("regex") is regex


def test_a_broken_pattern_is_found_before_training() -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        Regex("(")
    with pytest.raises(ValueError, match=r"the first is row 2: regex: '\('"):
        check_rewards([Reward(regex)], {"pattern": ["a", "("]})
