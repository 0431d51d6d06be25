from __future__ import annotations

import pytest

from fastrl.rewards import Reward, score
from fastrl.rewards.correlation import correlation


def test_correlation_is_pearsons_over_what_both_judged() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [0, -5, -10]) == pytest.approx(-1.0)
    assert correlation([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0.0)
    # deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2)
    assert correlation([1, None, 2, 3, 9], [1, 7, 3, 2, None]) == pytest.approx(0.5)


def test_nothing_correlates_with_a_constant_or_with_one_value() -> None:
    assert correlation([0.1, 0.1, 0.1], [1, 2, 3]) is None
    assert correlation([1, 2], [0.3, 0.3]) is None
    assert correlation([1, None], [1, 2]) is None


def test_rewards_are_correlated_with_each_other_and_with_length() -> None:
    def words(completions: list[str], **_: object) -> list[float]:
        return [float(len(text)) for text in completions]

    def right(completions: list[str], **_: object) -> list[float | None]:
        return [1.0, 0.0, None]

    metrics = score([Reward(words), Reward(right)], [""] * 3, ["a", "bb", "ccc"], [[1], [1, 1], [1, 1, 1]], {}).metrics
    found = {name: value for name, value in metrics.items() if "correlation" in name}
    assert found == pytest.approx(
        {
            "rewards/correlation/words/right": -1.0,
            "rewards/correlation/words/length": 1.0,
            "rewards/correlation/right/length": -1.0,
            "rewards/correlation/reward/length": 3**0.5 / 2,  # totals 2, 2, 3 against 1, 2, 3
        }
    )
