"""The harness is code too: it must fail what is wrong and pass what is right."""

from __future__ import annotations

import pytest
import torch

from fastrl.testing import (
    MemoryMeter,
    ValueAndGrads,
    assert_no_worse_than,
    error,
    linear_logprob_inputs,
    value_and_grads,
)


def one(value: float) -> ValueAndGrads:
    return ValueAndGrads((torch.tensor([value]),), ())


def test_an_error_within_the_naive_one_plus_slack_passes_and_a_larger_one_fails():
    assert_no_worse_than(naive=one(2.1), got=one(1.9), truth=one(2.0), slack=1e-3)
    assert_no_worse_than(naive=one(2.0), got=one(2.001), truth=one(2.0), slack=1e-3)
    with pytest.raises(AssertionError, match=r"values\[0\]"):
        assert_no_worse_than(naive=one(2.0), got=one(2.01), truth=one(2.0), slack=1e-3)


def test_nan_fails_and_equal_infinities_pass():
    inf, nan = float("inf"), float("nan")
    assert error(torch.tensor([inf, -inf]), torch.tensor([inf, -inf])) == 0
    assert error(torch.tensor([nan]), torch.tensor([1.0])) == inf
    assert error(torch.tensor([inf]), torch.tensor([-inf])) == inf
    with pytest.raises(AssertionError):
        assert_no_worse_than(naive=one(2.0), got=one(nan), truth=one(2.0), slack=1.0)


def test_another_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse_than(naive=one(1.0), got=ValueAndGrads((torch.ones(1, 1),), ()), truth=one(1.0), slack=1.0)


def test_value_and_grads_differentiates_with_the_fixed_cotangent():
    x = torch.arange(5.0)
    values, grads = value_and_grads(lambda x: x.square(), x)
    torch.testing.assert_close(values[0], x.square())
    # cotangents of output 0: -1, 0, 1, -1/2, 1/2
    torch.testing.assert_close(grads[0], 2 * x * torch.tensor([-1.0, 0.0, 1.0, -0.5, 0.5]))
    assert x.grad is None


def test_an_unused_input_and_a_constant_output_report_zeros():
    values, grads = value_and_grads(lambda a, b: (a.sum(), b.detach()), torch.ones(2), torch.ones(3))
    assert len(values) == 2
    torch.testing.assert_close(grads, (torch.ones(2), torch.zeros(3)))


def test_peaked_inputs_are_peaked():
    hidden, weight, target = linear_logprob_inputs(50, 64, 100, peak=20.0)
    logprob = (hidden @ weight.t()).log_softmax(-1)[torch.arange(50), target]
    assert logprob.exp().min() > 0.99


def test_memory_meter_sees_the_peak_and_not_the_sum():
    with MemoryMeter() as meter:
        for _ in range(4):
            x = torch.ones(1000)
            del x
    assert meter.largest_numel == 1000
    assert meter.peak_bytes == 4000
    kept = torch.ones(10)
    with MemoryMeter(kept) as meter:
        kept.add_(1)
    assert meter.peak_bytes == 0
