"""GAE against NumPy loops written after verl's and OpenRLHF's, on every backend that runs here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.ops.backend import choose
from fastrl.ops.gae import IMPLEMENTATIONS, gae


def runs_here(backend: str) -> bool:
    try:
        choose(backend, torch.zeros(1), IMPLEMENTATIONS)
    except RuntimeError:
        return False
    return True


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here(name), reason=f"{name} is not built here"))
    for name in ("reference", "torch", "native")
]
AVAILABLE = [name for name in ("reference", "torch", "native") if runs_here(name)]


def verl(reward, value, mask, gamma, lam):
    """One sequence: `compute_gae_advantage_return` of verl, without its whitening."""
    next_value, last, advantage = 0.0, 0.0, np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value - value[t]
        here = delta + gamma * lam * last
        next_value = value[t] * mask[t] + (1 - mask[t]) * next_value
        last = here * mask[t] + (1 - mask[t]) * last
        advantage[t] = last
    return advantage, advantage + value


def openrlhf(reward, value, mask, gamma, lam):
    """One sequence: `get_advantages_and_returns` of OpenRLHF."""
    reward, value = reward * mask, value * mask
    last, advantage = 0.0, np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        next_value = value[t + 1] if t < len(reward) - 1 else 0.0
        last = reward[t] + gamma * next_value - value[t] + gamma * lam * last
        advantage[t] = last
    return advantage, advantage + value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("skip", "first"), [(True, 0.125), (False, -0.1875)])
def test_the_worked_example_of_the_docstring(backend, skip, first):
    advantage, returns = gae(
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([0.5, 9.0, 0.25]),
        torch.tensor([0, 3]),
        torch.tensor([True, False, True]),
        gamma=1.0,
        lam=0.5,
        skip_observations=skip,
        backend=backend,
    )
    assert advantage.tolist() == [first, 0.0, 0.75]
    assert returns.tolist() == [first + 0.5, 0.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_one_without_critic_is_the_sum_of_later_rewards(backend):
    advantage, returns = gae(
        torch.tensor([1.0, 2.0, 3.0, 10.0]),
        torch.zeros(4),
        torch.tensor([0, 3, 4]),
        torch.ones(4, dtype=torch.bool),
        lam=1.0,
        backend=backend,
    )
    assert advantage.tolist() == returns.tolist() == [6.0, 5.0, 3.0, 10.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=6),
    seed=st.integers(0, 999),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    skip=st.booleans(),
    backend=st.sampled_from(AVAILABLE),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_both_conventions_agree_with_the_loops_they_come_from(lengths, seed, gamma, lam, skip, backend, dtype):
    random = np.random.default_rng(seed)
    total = sum(lengths)
    reward, value = random.normal(size=total).astype(np.float32), random.normal(size=total).astype(np.float32)
    trained = random.random(total) < 0.6
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=int)])
    expected = [np.zeros(total), np.zeros(total)]
    for start, end in pairwise(cu_seqlens):
        part = slice(start, end)
        oracle = verl if skip else openrlhf
        both = oracle(reward[part].astype(float), value[part].astype(float), trained[part], gamma, lam)
        for whole, piece in zip(expected, both, strict=True):
            whole[part] = np.where(trained[part], piece, 0.0)
    # What lies on untrained tokens is never read.
    got = gae(
        torch.tensor(np.where(trained, reward, np.nan), dtype=dtype),
        torch.tensor(np.where(trained, value, np.nan), dtype=dtype),
        torch.tensor(cu_seqlens, dtype=torch.int32),
        torch.tensor(trained, dtype=torch.bool),
        gamma=gamma,
        lam=lam,
        skip_observations=skip,
        backend=backend,
    )
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for whole, tensor in zip(expected, got, strict=True):
        assert tensor.dtype == dtype
        np.testing.assert_allclose(tensor, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_see_each_other(backend):
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    trained = torch.rand(12, generator=generator) < 0.7
    packed = gae(reward, value, torch.tensor([0, 5, 12]), trained, backend=backend)
    swap = torch.cat([torch.arange(5, 12), torch.arange(5)])
    swapped = gae(reward[swap], value[swap], torch.tensor([0, 7, 12]), trained[swap], backend=backend)
    torch.testing.assert_close(packed.advantage[swap], swapped.advantage)
    torch.testing.assert_close(packed.returns[swap], swapped.returns)


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_are_constants_of_the_critic(backend):
    value = torch.ones(2, requires_grad=True)
    result = gae(torch.ones(2), value, torch.tensor([0, 2]), torch.tensor([True, True]), backend=backend)
    assert not result.advantage.requires_grad
    assert not result.returns.requires_grad


def test_input_that_does_not_fit_is_named():
    ones, cut, mask = torch.ones(2), torch.tensor([0, 2]), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="value must be"):
        gae(ones, torch.ones(3), cut, mask)
    with pytest.raises(ValueError, match="bool"):
        gae(ones, ones, cut, ones)
    with pytest.raises(ValueError, match="float32 or float64"):
        gae(ones.bfloat16(), ones.bfloat16(), cut, mask)
    with pytest.raises(ValueError, match="rise from 0"):
        gae(ones, ones, torch.tensor([0, 1]), mask)
