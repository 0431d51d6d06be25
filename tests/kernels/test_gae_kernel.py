"""The GAE kernel against the recurrence in float64: both conventions, block borders, and what a GPU must repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.kernels import gae as kernel
from fastrl.ops.gae import gae


def inputs(lengths, *, seed=0, dtype=torch.float32, device="cpu", share=0.6):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    reward, value = torch.randn(2, total, generator=generator)
    trained = torch.rand(total, generator=generator) < share
    # What lies on untrained tokens is never read.
    reward, value = (torch.where(trained, x, torch.nan).to(device, dtype) for x in (reward, value))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return reward, value, cu_seqlens, trained.to(device)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    skip=st.booleans(),
    share=st.sampled_from([0.0, 0.6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_cut_agrees_with_the_recurrence(lengths, seed, gamma, lam, skip, share, dtype):
    reward, value, cu_seqlens, trained = inputs(lengths, seed=seed, dtype=dtype, share=share)
    options = {"gamma": gamma, "lam": lam, "skip_observations": skip}
    got = gae(reward, value, cu_seqlens, trained, **options, backend="triton")
    truth = gae(reward.double(), value.double(), cu_seqlens, trained, **options, backend="reference")
    slack = 1e-7 if dtype == torch.float32 else 1e-14
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=slack, atol=slack)


@pytest.mark.parametrize(("skip", "first"), [(True, 0.125), (False, -0.1875)])
def test_the_worked_example_of_the_docstring(skip, first):
    reward, value = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 9.0, 0.25])
    trained = torch.tensor([True, False, True])
    advantage, returns = kernel.forward(reward, value, torch.tensor([0, 3]), trained, 1.0, 0.5, skip)
    assert advantage.tolist() == [first, 0.0, 0.75]
    assert returns.tolist() == [first + 0.5, 0.0, 1.0]


@pytest.mark.parametrize("skip", [True, False])
def test_the_estimate_jumps_over_observations_that_fill_more_than_a_block(skip):
    trained = torch.zeros(50, dtype=torch.bool)
    trained[[2, 3, 44, 49]] = True
    reward, value = torch.where(trained, 1.0, torch.nan).double(), torch.where(trained, 0.5, torch.nan).double()
    cu_seqlens = torch.tensor([0, 50])
    got = kernel.forward(reward, value, cu_seqlens, trained, 0.9, 0.8, skip, tile=(16, 1))
    truth = gae(reward, value, cu_seqlens, trained, gamma=0.9, lam=0.8, skip_observations=skip, backend="reference")
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("tile", kernel.TILES)
@pytest.mark.parametrize("lengths", [[1], [131072], [1024] * 128, [0, 1, 1023, 1024, 1025, 60000, 0]])
def test_on_a_gpu_long_sequences_agree_with_float64_repeat_and_ignore_their_neighbours(lengths, tile, skip, dtype):
    reward, value, cu_seqlens, trained = inputs(lengths, dtype=dtype, device="cuda", share=0.75)
    got = kernel.forward(reward, value, cu_seqlens, trained, 0.99, 0.95, skip, tile=tile)
    again = kernel.forward(reward, value, cu_seqlens, trained, 0.99, 0.95, skip, tile=tile)
    cpu = (reward.double().cpu(), value.double().cpu(), cu_seqlens.cpu(), trained.cpu())
    truth = gae(*cpu, gamma=0.99, lam=0.95, skip_observations=skip, backend="torch")
    slack = 2e-7 if dtype == torch.float32 else 1e-11
    for a, b, expected in zip(got, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double().cpu(), expected, rtol=slack, atol=slack)
    part = slice(cu_seqlens[-2].item(), None)
    border = torch.tensor([0, reward[part].numel()], device="cuda")
    columns = (reward[part].clone(), value[part].clone(), border, trained[part].clone())
    alone = kernel.forward(*columns, 0.99, 0.95, skip, tile=kernel.fitted(tile, reward.numel()))
    if reward[part].numel() >= tile[0]:
        assert torch.equal(alone[0], got[0][part])
