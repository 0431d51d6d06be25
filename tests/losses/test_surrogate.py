"""Surrogates: numbers to check by hand, then value and derivative against the oracle over a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastrl.losses.surrogate import cispo, clipped, reinforce, sapo, vespo
from tests import oracle

GRID = [math.log(r) for r in (0.01, 0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.19, 1.21, 1.29, 2.0, 3.5, 6.0, 40.0)]
ADVANTAGES = (-2.0, -0.5, 0.0, 0.75, 3.0)

CASES = {
    "clipped": (clipped, partial(oracle.clipped, low=0.2, high=0.2)),
    "clip_higher": (partial(clipped, high=0.28), partial(oracle.clipped, low=0.2, high=0.28)),
    "dual": (partial(clipped, dual_clip=3.0), partial(oracle.clipped, low=0.2, high=0.2, dual=3.0)),
    "delta": (partial(clipped, delta=4.0), partial(oracle.clipped, low=0.2, high=0.2, delta=4.0)),
    "cispo": (cispo, partial(oracle.cispo, high=5.0)),
    "reinforce": (reinforce, oracle.reinforce),
    "sapo": (sapo, oracle.sapo),
    "vespo": (vespo, oracle.vespo),
}


def differentiated(
    surrogate: Callable[[Tensor, Tensor], Tensor], log_ratio: list[float], advantage: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = torch.tensor(log_ratio, dtype=dtype, requires_grad=True)
    loss = surrogate(x, torch.tensor(advantage, dtype=dtype))
    (slope,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), slope


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_the_papers_formula(name: str, dtype: torch.dtype) -> None:
    ours, theirs = CASES[name]
    points = [(x, a) for x in GRID for a in ADVANTAGES]
    value, slope = differentiated(ours, [x for x, _ in points], [a for _, a in points], dtype)
    truth = torch.tensor([theirs(x, a) for x, a in points], dtype=torch.float64)
    tight = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(value.double(), truth[:, 0], **tight)
    torch.testing.assert_close(slope.double(), truth[:, 1], **tight)


def test_clipped_gradient_vanishes_where_the_clip_binds() -> None:
    value, slope = differentiated(clipped, [math.log(r) for r in (0.5, 1.0, 1.5)], [1.0] * 3, torch.float64)
    torch.testing.assert_close(value, torch.tensor([-0.5, -1.0, -1.2], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([-0.5, -1.0, 0.0], dtype=torch.float64))


def test_clipped_keeps_pulling_back_a_token_that_went_the_wrong_way() -> None:
    value, slope = differentiated(clipped, [math.log(r) for r in (0.5, 1.5)], [-1.0] * 2, torch.float64)
    torch.testing.assert_close(value, torch.tensor([0.8, 1.5], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.5], dtype=torch.float64))


def test_dual_clip_holds_the_loss_of_a_negative_advantage_at_c_times_it() -> None:
    value, slope = differentiated(
        partial(clipped, dual_clip=3.0), [math.log(2.0), math.log(10.0)], [-2.0, -2.0], torch.float64
    )
    torch.testing.assert_close(value, torch.tensor([4.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([4.0, 0.0], dtype=torch.float64))


def test_delta_caps_the_ratio_only_where_the_advantage_is_negative() -> None:
    value, slope = differentiated(partial(clipped, delta=4.0), [math.log(10.0)] * 2, [-1.0, 1.0], torch.float64)
    torch.testing.assert_close(value, torch.tensor([4.0, -1.2], dtype=torch.float64))
    assert slope.tolist() == [0.0, 0.0]


def test_cispo_caps_the_weight_but_never_the_gradient() -> None:
    _, slope = differentiated(cispo, [math.log(2.0), math.log(50.0)], [1.0, 1.0], torch.float64)
    torch.testing.assert_close(slope, torch.tensor([-2.0, -5.0], dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_on_policy_every_surrogate_is_the_policy_gradient(name: str) -> None:
    _, slope = differentiated(CASES[name][0], [0.0, 0.0], [1.5, -0.5], torch.float64)
    torch.testing.assert_close(slope, torch.tensor([-1.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_no_advantage_is_no_loss_and_no_gradient_exactly(name: str) -> None:
    value, slope = differentiated(CASES[name][0], GRID, [0.0] * len(GRID), torch.float32)
    assert not value.any()
    assert not slope.any()


def test_vespo_weighs_a_sequence_on_policy_by_one_and_a_runaway_by_almost_nothing() -> None:
    _, slope = differentiated(vespo, [0.0, math.log(8.0), 200.0], [1.0] * 3, torch.float64)
    torch.testing.assert_close(slope, torch.tensor([-1.0, -64 * math.exp(-21), 0.0], dtype=torch.float64))
