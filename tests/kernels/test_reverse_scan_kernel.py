"""The scan kernels against the loop in float64: cuts, block borders, both directions, and what a GPU must repeat."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.kernels import reverse_scan as kernel
from fastrl.ops.reverse_scan import reverse_scan
from fastrl.testing import assert_no_worse_than, double, value_and_grads


def inputs(lengths, *, seed=0, dtype=torch.float32, device="cpu", index=torch.int32, low=0.9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), generator=generator)
    decay = low + (1 - low) * torch.rand(sum(lengths), generator=generator)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=index, device=device)
    return x.to(device, dtype), decay.to(device, dtype), cu_seqlens


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_cut_agrees_with_the_loop_and_with_autograd(lengths, seed, dtype, index):
    x, decay, cu_seqlens = inputs(lengths, seed=seed, dtype=dtype, index=index, low=-1.0)
    run = partial(reverse_scan, cu_seqlens=cu_seqlens)
    assert_no_worse_than(
        naive=value_and_grads(partial(run, backend="reference"), x, decay),
        got=value_and_grads(partial(run, backend="triton"), x, decay),
        truth=value_and_grads(partial(run, backend="reference"), *double((x, decay))),
        slack=1e-7 if dtype == torch.float32 else 1e-15,
    )


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_one_number_is_carried_from_block_to_block_in_both_directions(length):
    x, decay, cu_seqlens = inputs([3, length, 1], dtype=torch.float64)
    y = kernel.forward(x, decay, cu_seqlens, tile=(16, 1))
    truth = value_and_grads(partial(reverse_scan, cu_seqlens=cu_seqlens, backend="reference"), x, decay)
    torch.testing.assert_close(y, truth.values[0], rtol=1e-14, atol=0)
    torch.manual_seed(0)
    dy = torch.randn_like(x)
    leaves = x.clone().requires_grad_(), decay.clone().requires_grad_()
    expected = torch.autograd.grad(reverse_scan(*leaves, cu_seqlens, backend="reference"), leaves, dy)
    got = kernel.backward(dy, decay, cu_seqlens, y, True, tile=(16, 1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert kernel.backward(dy, decay, cu_seqlens, y, False)[1] is None


def test_a_neighbour_that_is_nan_does_not_leak_across_the_border_in_either_direction():
    x = torch.tensor([1.0, 2.0, torch.nan, 3.0, 5.0], requires_grad=True)
    decay = torch.tensor([1.0, torch.nan, torch.nan, 1.0, torch.nan], requires_grad=True)  # ends are never read
    y = reverse_scan(x, decay, torch.tensor([0, 2, 3, 5]), backend="triton")
    assert y.detach()[[0, 1, 3, 4]].tolist() == [3.0, 2.0, 8.0, 5.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 2.0, 1.0, 1.0, 2.0]
    assert decay.grad.tolist() == [2.0, 0.0, 0.0, 5.0, 0.0]


def test_no_tokens_is_a_result_too():
    empty = torch.zeros(0, requires_grad=True)
    reverse_scan(empty, torch.zeros(0), torch.tensor([0, 0]), backend="triton").sum().backward()
    assert empty.grad.shape == (0,)


def test_a_sequence_s_bits_do_not_depend_on_its_neighbours():
    x, decay, cu_seqlens = inputs([20, 33, 7])
    whole = kernel.forward(x, decay, cu_seqlens, tile=(16, 1))
    alone = kernel.forward(x[20:53].clone(), decay[20:53].clone(), torch.tensor([0, 33]), tile=(16, 1))
    assert torch.equal(whole[20:53], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", kernel.TILES)
@pytest.mark.parametrize("lengths", [[1], [131072], [1024] * 128, [0, 1, 1023, 1024, 1025, 60000, 0]])
def test_on_a_gpu_long_sequences_agree_with_float64_and_repeat_bit_for_bit(lengths, tile, dtype):
    x, decay, cu_seqlens = inputs(lengths, dtype=dtype, device="cuda")
    dy = torch.randn_like(x)

    def both():
        y = kernel.forward(x, decay, cu_seqlens, tile=tile)
        return y, *kernel.backward(dy, decay, cu_seqlens, y, True, tile=tile)

    exact = [t.double().cpu().requires_grad_() for t in (x, decay)]
    y = reverse_scan(*exact, cu_seqlens.cpu(), backend="torch")
    truth = y.detach(), *torch.autograd.grad(y, exact, dy.double().cpu())
    got, again = both(), both()
    # y is rounded to f32 once, and ddecay is made from it.
    slack = 2e-7 if dtype == torch.float32 else 1e-12
    for a, b, expected in zip(got, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double().cpu(), expected, rtol=slack, atol=slack)


@pytest.mark.gpu
def test_on_a_gpu_a_sequence_s_bits_do_not_depend_on_its_neighbours():
    x, decay, cu_seqlens = inputs([5000, 7001, 3], device="cuda")
    whole = kernel.forward(x, decay, cu_seqlens)
    part = slice(5000, 12001)
    alone = kernel.forward(x[part].clone(), decay[part].clone(), torch.tensor([0, 7001], device="cuda"))
    assert torch.equal(whole[part], alone)
