"""A mean over prompts with its standard error."""

from __future__ import annotations

import math

import pytest

from fastrl.train.estimate import Estimate, estimate, estimate_by_group


def test_samples_of_a_prompt_are_one_observation() -> None:
    """Means 1, 0.5, 0: mean 0.5, variance 0.25, error sqrt(0.25 / 3)."""
    found = estimate([[1.0, 1.0], [0.0, 1.0, None], [0.0]])
    assert found == Estimate(0.5, pytest.approx(math.sqrt(0.25 / 3)), 3)
    assert str(found) == "50.0 % +- 28.9 (n=3)"


def test_more_samples_of_the_same_prompts_add_no_certainty() -> None:
    assert estimate([[1.0] * 100, [0.0] * 100]) == estimate([[1.0], [0.0]])


def test_prompts_without_a_verdict_are_left_out_and_one_prompt_has_no_error() -> None:
    assert estimate([[None, None], [0.25]]) == Estimate(0.25, 0.0, 1)
    with pytest.raises(ValueError, match="no prompt has a score"):
        estimate([[None], []])


def test_groups_are_told_apart_by_number_not_by_place() -> None:
    assert estimate_by_group([1.0, 0.0, 1.0, None], [4, 9, 4, 9]) == estimate([[1.0, 1.0], [0.0]])
