"""The scan against a NumPy loop in float64, on every backend that runs here."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrl.ops.backend import choose
from fastrl.ops.reverse_scan import IMPLEMENTATIONS, reverse_scan
from fastrl.testing import assert_no_worse_than, double, value_and_grads


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


def oracle(x: np.ndarray, decay: np.ndarray, lengths: list[int]) -> np.ndarray:
    y = np.zeros(len(x))
    start = 0
    for n in lengths:
        for t in range(start + n - 1, start - 1, -1):
            y[t] = x[t] + (decay[t] * y[t + 1] if t < start + n - 1 else 0.0)
        start += n
    return y


def borders(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_is_summed_from_its_own_right_end(backend):
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    decay = torch.full((5,), 0.5)
    y = reverse_scan(x, decay, torch.tensor([0, 3, 5]), backend=backend)
    # 4; 2 + 4/2 = 4; 1 + 4/2 = 3 | 16; 8 + 16/2 = 16
    assert y.tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_scan_from_the_left_and_the_carried_value(backend):
    x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    decay = torch.tensor([0.5, 0.25, 9.0], requires_grad=True)
    reverse_scan(x, decay, torch.tensor([0, 3]), backend=backend).sum().backward()
    # y2 = 4, y1 = 2 + 1 = 3, y0 = 1 + 1.5; dx0 = 1, dx1 = 1 + .5, dx2 = 1 + .25 * 1.5
    assert x.grad.tolist() == [1.0, 1.5, 1.375]
    assert decay.grad.tolist() == [3.0, 1.5 * 4.0, 0.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=6),
    seed=st.integers(0, 999),
    backend=st.sampled_from(AVAILABLE),
)
def test_any_cut_agrees_with_the_loop_and_with_autograd(lengths, seed, backend):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    decay = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    y = reverse_scan(x, decay, borders(lengths), backend=backend)
    np.testing.assert_allclose(y, oracle(x.numpy(), decay.numpy(), lengths), rtol=1e-12, atol=1e-12)
    run = partial(reverse_scan, cu_seqlens=borders(lengths))
    truth = value_and_grads(partial(run, backend="reference"), x, decay)
    assert_no_worse_than(
        naive=truth, got=value_and_grads(partial(run, backend=backend), x, decay), truth=truth, slack=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000])
def test_f32_errs_no_more_than_the_loop_does(backend, length):
    generator = torch.Generator().manual_seed(length)
    lengths = [length, 1, 3]
    x = torch.randn(sum(lengths), generator=generator)
    decay = 0.9 + 0.1 * torch.rand(sum(lengths), generator=generator)
    run = partial(reverse_scan, cu_seqlens=borders(lengths, torch.int64))
    assert_no_worse_than(
        naive=value_and_grads(partial(run, backend="reference"), x, decay),
        got=value_and_grads(partial(run, backend=backend), x, decay),
        truth=value_and_grads(partial(run, backend="reference"), *double((x, decay))),
        slack=2e-7,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbour_that_is_nan_does_not_leak_across_the_border(backend):
    x = torch.tensor([1.0, 2.0, torch.nan, 3.0, 5.0])
    decay = torch.tensor([1.0, torch.nan, torch.nan, 1.0, torch.nan])  # the last of each sequence is never read
    y = reverse_scan(x, decay, torch.tensor([0, 2, 3, 5]), backend=backend)
    assert y[[0, 1, 3, 4]].tolist() == [3.0, 2.0, 8.0, 5.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_is_a_result_too(backend):
    empty = torch.zeros(0, requires_grad=True)
    y = reverse_scan(empty, torch.zeros(0), torch.tensor([0, 0, 0]), backend=backend)
    y.sum().backward()
    assert y.shape == empty.grad.shape == (0,)


@pytest.mark.parametrize(
    ("x", "decay", "cu_seqlens", "message"),
    [
        (torch.ones(3), torch.ones(3), torch.tensor([0, 2]), "rise from 0 to T=3"),
        (torch.ones(3), torch.ones(3), torch.tensor([0, 2, 1, 3]), "rise from 0 to T=3"),
        (torch.ones(3), torch.ones(3), torch.tensor([0.0, 3.0]), "int32 or int64"),
        (torch.ones(3), torch.ones(2), torch.tensor([0, 3]), "decay must be"),
        (torch.ones(3), torch.ones(3).double(), torch.tensor([0, 3]), "float32 or float64"),
        (torch.ones(1, 3), torch.ones(1, 3), torch.tensor([0, 3]), "x must be"),
    ],
)
def test_input_that_does_not_fit_is_named(x, decay, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        reverse_scan(x, decay, cu_seqlens)
