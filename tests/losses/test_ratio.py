from __future__ import annotations

import torch

from fastrl.losses.ratio import sequence_product, sequence_ratio, sequence_total, token_ratio

# two sequences of 3 and 2 tokens; the first token of each is not trained and must not be read
LOG_RATIO = torch.tensor([float("nan"), 0.2, 0.4, float("nan"), -0.3], dtype=torch.float64)
SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
TRAINED = torch.tensor([False, True, True, False, True])


def test_a_tokens_own_ratio_is_left_alone() -> None:
    assert token_ratio(LOG_RATIO, SEQUENCE, TRAINED) is LOG_RATIO


def test_a_limit_holds_the_log_ratio_and_stops_its_gradient() -> None:
    x = torch.tensor([-30.0, 1.0, 25.0], requires_grad=True)
    held = token_ratio(x, SEQUENCE[:3], TRAINED[:3], limit=20.0)
    (slope,) = torch.autograd.grad(held.sum(), x)
    assert held.tolist() == [-20.0, 1.0, 20.0]
    assert slope.tolist() == [0.0, 1.0, 0.0]


def test_a_sequences_ratio_is_the_mean_of_its_trained_tokens() -> None:
    shared = sequence_ratio(LOG_RATIO, SEQUENCE, TRAINED)
    torch.testing.assert_close(shared[TRAINED], torch.tensor([0.3, 0.3, -0.3], dtype=torch.float64))


def test_a_sequences_product_is_the_sum_of_its_log_ratios() -> None:
    shared = sequence_product(LOG_RATIO, SEQUENCE, TRAINED)
    torch.testing.assert_close(shared[TRAINED], torch.tensor([0.6, 0.6, -0.3], dtype=torch.float64))


def test_the_gradient_goes_through_the_token_alone() -> None:
    for shared in (sequence_ratio, sequence_product):
        x = LOG_RATIO.clone().requires_grad_()
        (slope,) = torch.autograd.grad(shared(x, SEQUENCE, TRAINED)[1], x)
        assert slope.tolist() == [0, 1, 0, 0, 0]


def test_gspos_token_form_has_the_sequence_forms_gradient() -> None:
    """sum over tokens of exp(token form) / n has value s and gradient s / n per token, like s = exp(mean) itself."""
    x = torch.tensor([0.1, -0.4, 0.6], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.bool)
    token_form = sequence_ratio(x, torch.zeros(3, dtype=torch.int64), ones).exp().mean()
    sequence_form = x.mean().exp()
    torch.testing.assert_close(token_form, sequence_form)
    torch.testing.assert_close(torch.autograd.grad(token_form, x)[0], torch.autograd.grad(sequence_form, x)[0])


def test_totals_of_a_sequence_without_trained_tokens_are_zero() -> None:
    total = sequence_total(LOG_RATIO, SEQUENCE, torch.tensor([False, True, True, False, False]))
    torch.testing.assert_close(total, torch.tensor([0.6, 0.6, 0.6, 0.0, 0.0], dtype=torch.float64))


def test_an_empty_batch_has_no_ratio() -> None:
    empty = torch.zeros(0)
    assert sequence_ratio(empty, empty.long(), empty.bool()).shape == (0,)
