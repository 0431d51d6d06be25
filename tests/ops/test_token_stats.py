"""A row of logits to numbers and back, from logits and from probabilities that were kept."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.ops.logit_map import LogitMap
from fastrl.ops.single_pass import gradient_bound
from fastrl.ops.token_stats import RowGrads, RowStats, cached_gradient, row_gradient_, row_stats

RAW = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
TARGET = torch.tensor([2, -1])


def test_row_statistics_leave_the_logits_alone():
    raw = RAW.clone()
    stats = row_stats(raw, TARGET, LogitMap(), with_mean=True)
    torch.testing.assert_close(raw, RAW, rtol=0, atol=0)
    torch.testing.assert_close(stats.lse, RAW.logsumexp(-1))
    torch.testing.assert_close(stats.mean_logit, torch.tensor([4 / 3, 2.0], dtype=torch.float64))
    torch.testing.assert_close(stats.entropy[1], torch.tensor(3.0, dtype=torch.float64).log())
    assert stats.logprob[1] == 0


@pytest.mark.parametrize(
    "logit_map", [LogitMap(), LogitMap(1.5, None, 0.7), LogitMap(1.5, 4.0, torch.tensor([0.7, 2]))]
)
@pytest.mark.parametrize("which", [(1, None, None, None), (None, 1, None, None), (None, None, 1, None), (1, 2, 3, 4)])
def test_the_gradient_formula_is_the_derivative_of_the_statistics(which, logit_map):
    grads = RowGrads(*(None if x is None else torch.tensor([0.5, -1.5], dtype=torch.float64) * x for x in which))
    leaf = RAW.clone().requires_grad_()
    z = logit_map.apply(leaf)
    logp = z.log_softmax(-1)
    values = [
        logp.gather(-1, TARGET.clamp(min=0)[:, None])[:, 0] * (TARGET >= 0),
        -(logp.exp() * logp).sum(-1),
        z.logsumexp(-1),
        z.mean(-1),
    ]
    sum((g * y).sum() for g, y in zip(grads, values, strict=True) if g is not None).backward()
    stats = row_stats(RAW, TARGET, logit_map)
    torch.testing.assert_close(row_gradient_(RAW.clone(), TARGET, stats, grads, logit_map), leaf.grad)
    if logit_map.softcap is None:
        kept = z.detach().softmax(-1)
        torch.testing.assert_close(cached_gradient(kept, TARGET, stats, grads, logit_map), leaf.grad)
    assert (leaf.grad.abs().sum(-1) <= gradient_bound(TARGET, stats, grads, logit_map) + 1e-12).all()


def test_a_kept_probability_is_not_overwritten():
    stats = row_stats(RAW, TARGET, LogitMap())
    kept = RAW.softmax(-1)
    before = kept.clone()
    ones = torch.ones(2, dtype=torch.float64)
    cached_gradient(kept, TARGET, stats, RowGrads(ones, ones, ones), LogitMap())
    torch.testing.assert_close(kept, before, rtol=0, atol=0)


@pytest.mark.parametrize("top", [3.0, 9.0, 14.0])
@pytest.mark.parametrize("shift", [0.0, 16.0, -100.0])
def test_the_target_of_a_confident_row_keeps_the_digits_of_one_minus_p(shift, top):
    raw, target, ones = torch.tensor([[shift, shift + top]]), torch.tensor([1]), torch.ones(1)
    exact = row_stats(raw.double(), target, LogitMap())
    stats = RowStats(*(None if x is None else x.float() for x in exact))
    grad = row_gradient_(raw, target, stats, RowGrads(ones, None, None), LogitMap())
    # z - lse would err by half of the last digit of lse: by 4e-6 at 100, where 1 - p is 8e-7 for top = 14.
    assert grad[0, 1].item() == pytest.approx(1 / (1 + math.exp(top)), rel=2e-6, abs=0)


def test_a_probability_rounded_to_bf16_keeps_an_exact_target_gradient():
    raw = torch.tensor([[0.0, 9.0]])  # 1 - p = 1.2e-4, below bf16's 2^-9
    target = torch.tensor([1])
    stats = row_stats(raw, target, LogitMap())
    grad = cached_gradient(raw.softmax(-1).bfloat16(), target, stats, RowGrads(torch.ones(1), None, None), LogitMap())
    assert grad[0, 1].item() == pytest.approx(1.2339e-4, rel=1e-3)
