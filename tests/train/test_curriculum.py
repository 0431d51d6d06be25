from __future__ import annotations

import pytest

from fastrl.rewards import Reward, exact_match, think_format
from fastrl.train.curriculum import check_schedule, factor_at, points_from, scheduled, weight_metrics


def test_the_factor_is_linear_between_the_points_and_constant_outside() -> None:
    points = points_from("10: 1, 20: 0, 40: 0.5")
    assert [factor_at(points, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 0.5, 0, 0.25, 0.5, 0.5]
    assert factor_at(points_from("5: 2"), 0) == factor_at(points_from("5: 2"), 50) == 2


def test_weights_are_the_configured_ones_times_the_factor() -> None:
    rewards = [Reward(exact_match, 2.0), Reward(think_format, 0.5, "format")]
    now = scheduled(rewards, {"format": "0: 1, 100: 0"}, 25)
    assert [reward.weight for reward in now] == [2.0, 0.375]
    assert weight_metrics(now, {"format": "0: 1"}) == {"rewards/format/weight": 0.375}


@pytest.mark.parametrize("text", ["", "1", "0: a", "5: 1, 5: 2", "9: 1, 3: 2", "-1: 1", "0: inf", "0: 1,"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        points_from(text)


def test_a_schedule_of_a_reward_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no reward 'form'; the run has: format"):
        check_schedule({"form": "0: 1"}, ["format"])
