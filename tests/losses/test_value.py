"""The critic's losses: numbers to check by hand, then value and gradient against the oracle over a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastrl.losses.value import value_clipped, value_is_clipped, value_squared
from tests import oracle_ppo as oracle

GRID = list(itertools.product((-3.0, -0.45, 0.1, 0.29, 0.31, 2.5), (-0.25, 0.1), (-1.0, 0.05, 0.17, 4.0)))
VALUE, OLD, RETURNS = (list(column) for column in zip(*GRID, strict=True))


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    value, old, returns = (torch.tensor(column, dtype=dtype) for column in (VALUE, OLD, RETURNS))
    return value.requires_grad_(), old, returns


@pytest.mark.parametrize("clip", [None, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_the_papers_formula(clip: float | None, dtype: torch.dtype) -> None:
    value, old, returns = tensors(dtype)
    if clip is None:
        loss = value_squared(value, returns)
        expected = [oracle.value_squared(v, r) for v, _, r in GRID]
    else:
        loss = value_clipped(value, old, returns, clip=clip)
        expected = [oracle.value_clipped(v, o, r, clip) for v, o, r in GRID]
    (slope,) = torch.autograd.grad(loss.sum(), value)
    truth = torch.tensor(expected, dtype=torch.float64)
    tight = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.detach().double(), truth[:, 0], **tight)
    torch.testing.assert_close(slope.double(), truth[:, 1], **tight)


def test_a_value_that_ran_towards_its_return_pulls_no_further_than_the_band() -> None:
    value = torch.tensor([0.1, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    loss = value_clipped(value, old, returns, clip=0.2)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    # Inside; past the band on the way to 1; past it on the way from -1, where it is pulled back in full.
    torch.testing.assert_close(loss.detach(), torch.tensor([0.405, 0.32, 1.125], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([-0.9, 0.0, 1.5], dtype=torch.float64))
    assert value_is_clipped(value, old, returns, clip=0.2).tolist() == [False, True, False]


def test_where_the_gradient_vanishes_is_where_the_clip_is_reported() -> None:
    value, old, returns = tensors(torch.float32)
    (slope,) = torch.autograd.grad(value_clipped(value, old, returns, clip=0.2).sum(), value)
    assert torch.equal(value_is_clipped(value, old, returns, clip=0.2), (slope == 0) & (value != returns))
