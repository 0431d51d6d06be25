"""Sums over micro-batches, and means over trained tokens or items."""

from __future__ import annotations

import pytest
import torch

from fastrl.train.metrics import means_of, sums_of
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
    sums = sums_of([(first, batch([0.1, 0.0, -0.1])), (second, batch([0.7]))])
    assert means_of(sums, grad_norm=torch.tensor(2.5)) == {"loss": 0.25, "grad_norm": 2.5, "entropy": 4.0}


def test_item_metrics_are_means_over_the_items_of_the_step_that_are_not_nan() -> None:
    nan = float("nan")
    first = LossOutput(torch.tensor(0.0), item_metrics={"rewards/margins": torch.tensor([1.0, 2.0])})
    second = LossOutput(torch.tensor(0.0), item_metrics={"rewards/margins": torch.tensor([6.0, nan])})
    sums = sums_of([(first, batch([0.1, 0.0, -0.1])), (second, batch([0.7]))])
    assert means_of(sums) == {"loss": 0.0, "rewards/margins": 3.0}


def test_a_metric_that_nothing_counted_in_is_left_out() -> None:
    untrained = LossOutput(torch.tensor(0.0), {"kl": torch.tensor([5.0])}, {"margin": torch.tensor([float("nan")])})
    assert means_of(sums_of([(untrained, batch([0.0]))])) == {"loss": 0.0}


def test_many_small_values_are_summed_in_float64() -> None:
    value = torch.full((100_000,), 0.1)
    sums = sums_of([(LossOutput(torch.tensor(0.0), {"ratio": value}), batch([1.0] * 100_000))] * 3)
    assert means_of(sums)["ratio"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
