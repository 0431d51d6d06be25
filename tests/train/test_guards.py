from __future__ import annotations

import math

import pytest
import torch

from fastrl.rewards.score import RewardError
from fastrl.train.guards import (
    NoVerdictError,
    SamplerMismatchError,
    check_probability_error,
    check_verdicts,
    effective_sample_share,
    finite,
    probability_error,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_sees_either_number(bad: float) -> None:
    good = torch.tensor(1.0)
    assert finite(good, good)
    assert not finite(torch.tensor(bad), good)
    assert not finite(good, torch.tensor(bad))


def test_probability_error_is_the_mean_factor_whatever_its_direction() -> None:
    probability = torch.tensor([0.5, 0.2, 0.1])
    sampler = torch.tensor([0.5, 0.4, 0.05])
    assert probability_error(probability.log(), sampler.log()).item() == pytest.approx((1 + 2 + 2) / 3)


def test_a_run_stops_when_sampler_and_trainer_disagree() -> None:
    check_probability_error(1.19, step=3)
    for value in (1.21, math.nan, math.inf):
        with pytest.raises(SamplerMismatchError, match="step 3: sampler and trainer differ by a factor"):
            check_probability_error(value, step=3)


def test_effective_sample_share_of_known_weights() -> None:
    assert effective_sample_share(torch.full((4,), 100.0)).item() == 1.0
    assert effective_sample_share(torch.tensor([1.0, 1.0, 2.0]).log()).item() == pytest.approx(16 / 18)
    assert effective_sample_share(torch.tensor([0.0, -1000.0])).item() == 0.5


def test_the_third_round_without_a_verdict_stops_the_run_and_one_verdict_forgives() -> None:
    nothing, errors = torch.tensor([torch.nan, torch.nan]), {"judge": RewardError(2, "service down")}
    count = check_verdicts(nothing, 0, errors)
    assert count == 1
    assert check_verdicts(torch.tensor([torch.nan, 0.0]), count, errors) == 0
    count = check_verdicts(nothing, count, errors)
    with pytest.raises(NoVerdictError, match=r"'judge' failed on 2 of 2 .*\n?service down"):
        check_verdicts(nothing, count, errors)
    with pytest.raises(NoVerdictError, match="all None"):
        check_verdicts(nothing, 2, {})
