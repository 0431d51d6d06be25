from __future__ import annotations

import pytest

from fastrl.rewards import Reward, Scores, score
from fastrl.train.config import RewardsBlock
from fastrl.train.reward_workers import RewardErrorRateError, check_error_rates, workers_of

BLOCK = RewardsBlock(max_error_rate=0.25)


def scores(failures: int) -> Scores:
    """Of four completions, judged by a reward that fails on the first ones and by one that does not."""

    def sometimes(completions: list[str]) -> list[object]:
        return [ValueError("server is down")] * failures + [1.0] * (4 - failures)

    def always(completions: list[str]) -> list[float]:
        return [1.0] * 4

    return score([Reward(sometimes), Reward(always)], ["p"] * 4, ["a"] * 4, [[1]] * 4, {})


def test_three_steps_in_a_row_above_the_limit_stop_the_run_and_name_the_function() -> None:
    failing = check_error_rates(scores(2), {}, BLOCK)
    failing = check_error_rates(scores(2), failing, BLOCK)
    assert failing == {"sometimes": 2}
    with pytest.raises(
        RewardErrorRateError, match=r"'sometimes' failed on 50\.0% of the completions, more than"
    ) as error:
        check_error_rates(scores(2), failing, BLOCK)
    assert "ValueError: server is down" in str(error.value)


def test_a_step_at_the_limit_starts_the_count_again() -> None:
    assert check_error_rates(scores(1), {"sometimes": 2}, BLOCK) == {}
    assert check_error_rates(scores(0), {"sometimes": 2}, BLOCK) == {}


def test_a_limit_of_one_never_stops() -> None:
    assert check_error_rates(scores(4), {"sometimes": 2}, RewardsBlock(max_error_rate=1.0)) == {}


def test_no_workers_is_no_pool() -> None:
    assert workers_of(RewardsBlock(workers=0)) is None
    assert workers_of(RewardsBlock(workers=3)) is not None
