"""Rows of two chunks of logits to divergences and gradients, against float64: maps, block borders, padding, -inf."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastrl.kernels import divergence as kernel
from fastrl.kernels.logit_map import map_arguments
from fastrl.kernels.tuning import RowTile
from fastrl.ops.divergence import divergence_rows, torch_rows
from fastrl.ops.logit_map import LogitMap
from tests.kernels.test_token_stats_kernel import MAPS

TILE = RowTile(128, 4, 1)
BETAS = [0.0, 0.3, 1.0]
IDENTITIES = MAPS["identity"], MAPS["identity"]


def logits(v, dtype=torch.float32, n=3):
    generator = torch.Generator().manual_seed(v)
    return tuple((3 * torch.randn(n, v, generator=generator)).to(dtype) for _ in range(2))


def by_kernel(student, teacher, beta, maps=IDENTITIES):
    """Divergence and gradient, which replaces the student's logits."""
    lse = tuple(each.apply(raw).logsumexp(-1) for each, raw in zip(maps, (student, teacher), strict=True))
    arguments = [map_arguments(x.scale, x.softcap, x.temperature, student.dtype) for x in maps]
    return kernel.rows_(student, teacher, lse, *arguments, beta, tile=TILE), student


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("v", [1, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_float64(dtype, v, beta):
    student, teacher = logits(v, dtype)
    truth = divergence_rows(student.double(), teacher.double(), beta)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for got, exact in zip(by_kernel(student, teacher, beta), truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["scale and temperature", "cap"])
def test_each_side_has_its_own_map(name, beta):
    maps = MAPS[name], LogitMap(0.9, 2.0, 1.3)
    student, teacher = logits(200, torch.float64)
    truth = torch_rows(student, teacher, *maps, beta)
    for got, exact in zip(by_kernel(student, teacher, beta, maps), truth, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_padding_between_rows_is_neither_read_nor_written():
    student, teacher = logits(200)
    truth = divergence_rows(student.double(), teacher.double(), 0.3)
    wide = [torch.full((3, 256), math.nan) for _ in range(2)]
    for memory, values in zip(wide, (student, teacher), strict=True):
        memory[:, :200] = values
    got = by_kernel(wide[0][:, :200], wide[1][:, :200], 0.3)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=3e-6, atol=3e-6)
    assert wide[0][:, 200:].isnan().all()


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_both_forbid_count_nothing(beta):
    student, teacher = logits(200)
    truth = divergence_rows(student[:, 7:].double(), teacher[:, 7:].double(), beta)
    student[:, :7] = teacher[:, :7] = -math.inf
    value, gradient = by_kernel(student, teacher, beta)
    torch.testing.assert_close(value.double(), truth[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient[:, 7:].double(), truth[1], rtol=3e-6, atol=3e-6)
    assert (gradient[:, :7] == 0).all()


def test_a_token_that_one_side_alone_forbids_is_infinite_for_one_kl():
    for beta, side in ((0.0, 0), (1.0, 1)):
        for forbidden in (0, 1):
            raw = logits(150)
            raw[forbidden][:, 3] = -math.inf
            with np.errstate(invalid="ignore"):  # the gradient of an infinite number is none
                value, _ = by_kernel(*raw, beta)
            assert bool((value == math.inf).all()) == (forbidden == side)


def test_no_rows_launch_nothing():
    assert by_kernel(torch.zeros(0, 5), torch.zeros(0, 5), 0.5)[0].shape == (0,)
