"""Sums over micro-batches and means over trained tokens."""

from __future__ import annotations

import pytest
import torch

from fastrl.train.metrics import token_means, token_sums
from fastrl.types import LossOutput, TokenBatch


def batch(weight: list[float]) -> TokenBatch:
    n = len(weight)
    ids = torch.zeros(n, dtype=torch.int64)
    borders = torch.tensor([0, n], dtype=torch.int32)
    return TokenBatch(ids, ids, ids, torch.tensor(weight), borders, n, torch.tensor([0]))


def test_means_are_over_trained_tokens_of_all_micro_batches_whatever_the_others_hold() -> None:
    nan = float("nan")
    first = LossOutput(torch.tensor(0.5), {"entropy": torch.tensor([1.0, nan, 3.0])})
    second = LossOutput(torch.tensor(-0.25), {"entropy": torch.tensor([8.0])})
    sums = token_sums([(first, batch([0.1, 0.0, -0.1])), (second, batch([0.7]))])
    assert token_means(sums) == {"loss": 0.25, "tokens": 3.0, "entropy": 4.0}


def test_a_metric_of_some_micro_batches_and_steps_without_tokens_are_no_division_by_zero() -> None:
    assert token_means({}) == {"loss": 0.0, "tokens": 0.0}
    empty = token_sums([(LossOutput(torch.tensor(0.0), {"kl": torch.tensor([5.0])}), batch([0.0]))])
    assert token_means(empty) == {"loss": 0.0, "tokens": 0.0, "kl": 0.0}


def test_many_small_values_are_summed_in_float64() -> None:
    value = torch.full((100_000,), 0.1)
    sums = token_sums([(LossOutput(torch.tensor(0.0), {"ratio": value}), batch([1.0] * 100_000))] * 3)
    assert token_means(sums)["ratio"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
