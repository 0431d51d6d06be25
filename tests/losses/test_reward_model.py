"""Losses of scoring models against the oracle, value and gradient; aggregation and calibration on numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastrl.losses import reward_model
from tests import oracle_reward_model as oracle

PAIRS = [(0.3, -0.2), (-1.5, 2.0), (0.0, 0.0), (4.0, -7.0), (-30.0, 31.0), (0.7, 0.0), (60.0, -60.0)]
PRECISIONS = [torch.float32, torch.float64]

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[float, ...]]]] = {
    "bradley_terry": (reward_model.bradley_terry, oracle.bradley_terry),
    "margin": (
        lambda c, r: reward_model.bradley_terry(c, r, margin=torch.full_like(c, 0.75)),
        partial(oracle.bradley_terry, margin=0.75),
    ),
    "centering": (reward_model.centering, oracle.centering),
}


def close(got: Tensor, expected: list[float]) -> None:
    rtol, atol = (1e-12, 1e-14) if got.dtype == torch.float64 else (1e-5, 1e-30)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_losses_of_pairs_equal_the_oracle_in_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    loss, expected = CASES[name]
    chosen, rejected = (torch.tensor(side, dtype=dtype, requires_grad=True) for side in zip(*PAIRS, strict=True))
    value = loss(chosen, rejected)
    value.sum().backward()
    by_hand = [expected(c, r) for c, r in PAIRS]
    for got, column in ((value.detach(), 0), (chosen.grad, 1), (rejected.grad, 2)):
        assert got is not None
        close(got, [each[column] for each in by_hand])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_steps_equal_the_oracle_in_value_and_gradient(dtype: torch.dtype) -> None:
    steps = [(0.3, True), (0.3, False), (-40.0, True), (-40.0, False), (0.0, True), (25.0, True), (25.0, False)]
    score = torch.tensor([s for s, _ in steps], dtype=dtype, requires_grad=True)
    value = reward_model.step_cross_entropy(score, torch.tensor([label for _, label in steps]))
    value.sum().backward()
    assert score.grad is not None
    by_hand = [oracle.step_cross_entropy(*step) for step in steps]
    close(value.detach(), [each[0] for each in by_hand])
    close(score.grad, [each[1] for each in by_hand])


def test_equal_scores_cost_log_two_and_the_margin_is_where_they_do() -> None:
    two, five = torch.tensor([2.0]), torch.tensor([5.0])
    assert reward_model.bradley_terry(two, two).item() == pytest.approx(math.log(2))
    assert reward_model.bradley_terry(five, two, margin=torch.tensor([3.0])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("quality", [[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0]])
def test_a_list_is_the_mean_over_its_ordered_pairs(quality: list[float]) -> None:
    score = torch.tensor([0.5, -0.25, 1.5, 0.1][: len(quality)], dtype=torch.float64, requires_grad=True)
    better, worse = reward_model.ranked_pairs(torch.tensor(quality)).T
    loss = reward_model.bradley_terry(score[better], score[worse]).mean()
    loss.backward()
    value, slope = oracle.ranking(score.tolist(), quality)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert score.grad is not None
    close(score.grad, slope)


def test_pairs_of_a_list_leave_equal_qualities_out() -> None:
    assert reward_model.ranked_pairs(torch.tensor([2.0, 1.0, 2.0])).tolist() == [[0, 1], [2, 1]]
    assert len(reward_model.ranked_pairs(torch.arange(9.0))) == 9 * 8 / 2
    assert reward_model.ranked_pairs(torch.zeros(3)).shape == (0, 2)


def test_steps_become_one_number_in_three_ways() -> None:
    probability = torch.tensor([0.9, 0.5, 0.8])
    assert reward_model.weakest(probability).item() == 0.5
    assert reward_model.product(probability).item() == pytest.approx(0.36)
    assert reward_model.last(probability).item() == pytest.approx(0.8)


def test_a_brier_score_is_the_squared_distance_from_what_happened() -> None:
    got = reward_model.brier(torch.tensor([0.5, 0.9, 0.9]), torch.tensor([True, True, False]))
    torch.testing.assert_close(got, torch.tensor([0.25, 0.01, 0.81]))


def test_calibration_is_the_gap_of_each_bin_and_zero_for_frequencies() -> None:
    confidence = torch.tensor([0.75] * 4 + [0.55] * 2)
    right = torch.tensor([True, True, True, False, True, True])
    assert reward_model.expected_calibration_error(confidence, right).item() == pytest.approx(2 * 0.45 / 6)
    apart = reward_model.expected_calibration_error(torch.tensor([0.05, 0.15]), torch.tensor([True, False]))
    assert apart.item() == pytest.approx((0.95 + 0.15) / 2)  # one bin would give 0.4
    border = reward_model.expected_calibration_error(torch.tensor([0.5, 0.6]), torch.tensor([True, False]), bins=2)
    assert border.item() == pytest.approx((0.5 + 0.6) / 2)  # 0.5 is in the lower bin
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(200, generator=generator)
    sure[:2] = torch.tensor([0.0, 1.0])
    hit = torch.rand(200, generator=generator) < sure
    for bins in (1, 7, 10):
        expected = oracle.expected_calibration_error(sure.double().tolist(), hit.tolist(), bins)
        assert reward_model.expected_calibration_error(sure, hit, bins=bins).item() == pytest.approx(expected)
