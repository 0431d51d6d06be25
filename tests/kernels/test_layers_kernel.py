"""The layers' kernels on tiles that rows and columns cross, against float64."""

from __future__ import annotations

import pytest
import torch

from fastrl.kernels import layers as kernel
from fastrl.kernels.layers import RowsTile
from fastrl.kernels.tuning import INTERPRETED, MACHINES

EPSILON = 1e-6


def exact_norm(x, weight, dy):
    """y, dx and dw in float64."""
    leaves = [each.double().requires_grad_() for each in (x, weight)]
    y = leaves[1] * leaves[0] * torch.rsqrt(leaves[0].pow(2).mean(-1, keepdim=True) + EPSILON)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


def norm_inputs(rows, width):
    generator = torch.Generator().manual_seed(rows + width)
    x, dy = torch.randn(2, rows, width, generator=generator)
    return x, 1 + 0.1 * torch.randn(width, generator=generator), dy


@pytest.mark.parametrize(
    ("rows", "width", "tile"),
    [
        (1, 1, None),
        (2, 16, RowsTile(2, 16, 4)),  # one tile, filled
        (3, 17, RowsTile(2, 16, 4)),  # a row and a column past it
        (70, 33, RowsTile(2, 16, 4)),  # several tiles in a span, rows in three blocks
        (5, 64, RowsTile(1, 16, 4)),
        (100, 12, None),
    ],
)
def test_the_norm_is_that_of_float64_on_any_tile(rows, width, tile):
    x, weight, dy = norm_inputs(rows, width)
    y, scale = kernel.rms_norm(x, weight, EPSILON, tile=tile)
    dx, dweight = kernel.rms_norm_backward(dy, x, weight, scale, True, tile=tile)
    for got, exact in zip((y, dx, dweight), exact_norm(x, weight, dy), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale, (x.pow(2).mean(-1) + EPSILON).rsqrt())
    alone, nothing = kernel.rms_norm_backward(dy, x, weight, scale, False, tile=tile)
    assert nothing is None
    assert torch.equal(alone, dx)


def test_a_row_wider_than_the_widest_block_is_cut():
    x, weight, dy = norm_inputs(3, kernel.WIDEST + 77)
    assert kernel.rows_tile(x.shape[1]).block_d == kernel.CUT
    y, scale = kernel.rms_norm(x, weight, EPSILON)
    dx, dweight = kernel.rms_norm_backward(dy, x, weight, scale, True)
    for got, exact in zip((y, dx, dweight), exact_norm(x, weight, dy), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_more_spans_than_a_block_of_the_second_stage_are_summed_in_the_same_order(monkeypatch):
    machine = MACHINES[INTERPRETED]._replace(programs=40)  # 80 spans
    monkeypatch.setitem(kernel.MACHINES, INTERPRETED, machine)
    x, weight, dy = norm_inputs(161, 5)
    tile = RowsTile(1, 16, 4)
    _, scale = kernel.rms_norm(x, weight, EPSILON, tile=tile)
    first, second = (kernel.rms_norm_backward(dy, x, weight, scale, True, tile=tile)[1] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), exact_norm(x, weight, dy)[2], rtol=1e-5, atol=1e-5)


def test_the_numbers_of_another_row_do_not_reach_a_row():
    x, weight, dy = norm_inputs(9, 20)
    x[4], dy[6] = torch.nan, torch.nan
    tile = RowsTile(4, 32, 4)
    y, scale = kernel.rms_norm(x, weight, EPSILON, tile=tile)
    dx, _ = kernel.rms_norm_backward(dy, x, weight, scale, False, tile=tile)
    assert y.isnan().any(1).tolist() == [row == 4 for row in range(9)]
    assert dx.isnan().any(1).tolist() == [row in (4, 6) for row in range(9)]


def test_a_rotation_turned_back_is_what_it_was_for_more_heads_than_a_block():
    heads = kernel.ROTARY_ELEMENTS // kernel.rotary_block(3) + 5
    query, key = torch.randn(2, heads, 6), torch.randn(2, 1, 6)
    half = torch.rand(2, 3)
    angle = torch.cat([half, half], 1)
    turned = kernel.rotary(query, key, angle.cos(), angle.sin(), False)
    assert (turned[0] - query).abs().amax((0, 2)).min() > 0  # every head turns
    for got, start in zip(kernel.rotary(*turned, angle.cos(), angle.sin(), True), (query, key), strict=True):
        torch.testing.assert_close(got, start)


def test_every_width_has_a_tile_of_warps_that_can_hold_it():
    for width in (1, 7, 64, 128, 1000, 4096, 5120, 8192, 8193, 65536):
        rows, block, warps = kernel.rows_tile(width)
        assert rows * block <= 512 * warps
        assert 4 <= warps <= 16
        assert block >= min(width, kernel.CUT)
