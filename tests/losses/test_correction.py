from __future__ import annotations

import math

import pytest
import torch

from fastrl.losses.correction import mask, sequence_mask, truncate


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([math.log(v) for v in values], dtype=torch.float64)


def test_truncation_caps_large_weights_and_keeps_small_ones() -> None:
    assert truncate(logs(0.1, 1.9, 7.0), high=2.0).tolist() == pytest.approx([0.1, 1.9, 2.0])


def test_the_mask_drops_weights_on_both_sides_and_keeps_the_rest_as_they_are() -> None:
    kept = mask(logs(0.4, 0.6, 1.0, 4.9, 5.1), low=0.5, high=5.0)
    assert kept.tolist() == pytest.approx([0, 0.6, 1.0, 4.9, 0])


def test_the_sequence_mask_gives_every_token_its_sequences_whole_weight_or_nothing() -> None:
    sequence = torch.tensor([0, 0, 0, 1, 1])
    trained = torch.tensor([False, True, True, True, True])
    # sequence 0: 1.5 * 1.2 = 1.8 is kept (the 100 is a prompt token); sequence 1: 2 * 2 = 4 exceeds 3
    weight = sequence_mask(logs(100.0, 1.5, 1.2, 2.0, 2.0), sequence, trained, high=3.0)
    torch.testing.assert_close(weight, torch.tensor([1.8, 1.8, 1.8, 0.0, 0.0], dtype=torch.float64))


def test_a_long_sequence_whose_weight_overflows_is_dropped_not_infinite() -> None:
    weight = sequence_mask(torch.full((400,), 2.0), torch.zeros(400).long(), torch.ones(400).bool(), high=3.0)
    assert not weight.any()


def test_corrections_are_constants() -> None:
    log_weight = logs(1.1, 1.2).requires_grad_()
    one = torch.ones(2).bool()
    for weight in (truncate(log_weight), mask(log_weight), sequence_mask(log_weight, torch.zeros(2).long(), one)):
        assert not weight.requires_grad
