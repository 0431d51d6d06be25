"""TRL's functions of logits, against plain autograd; TRL itself is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.integrations.trl_logits import (
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

SHAPES: list[tuple[int, ...]] = [(11,), (5, 11), (3, 5, 11), (2, 3, 5, 11)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=generator)


def truth(logits: Tensor, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, index[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, index = inputs(shape, dtype)
    exact = logits.detach().double().requires_grad_()
    logprob, entropy = selective_log_softmax_and_entropy(logits, index, temperature=0.7)
    expected = truth(exact, index, 0.7)
    torch.testing.assert_close(logprob, expected[0].to(dtype))
    torch.testing.assert_close(entropy, expected[1].to(dtype))
    got = torch.autograd.grad((logprob * 2 + entropy).sum(), logits)[0]
    want = torch.autograd.grad((expected[0] * 2 + expected[1]).sum(), exact)[0]
    torch.testing.assert_close(got, want.to(dtype))
    torch.testing.assert_close(selective_log_softmax(logits, index, 0.7), expected[0].to(dtype))
    torch.testing.assert_close(entropy_from_logits(logits), truth(exact, index)[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_have_results_rounded_once(dtype: torch.dtype) -> None:
    logits, index = inputs((3, 5, 101), dtype)
    expected = truth(logits.detach().double(), index)
    assert torch.equal(selective_log_softmax(logits, index), expected[0].to(dtype))
    assert torch.equal(entropy_from_logits(logits), expected[1].to(dtype))


def test_several_classes_per_row() -> None:
    logits, index = inputs((3, 5, 11))
    several = torch.stack([index, (index + 1) % 11], -1)
    got = selective_log_softmax(logits, several, 0.7)
    want = (logits.double() / 0.7).log_softmax(-1).gather(-1, several)
    torch.testing.assert_close(got, want.float())
    torch.testing.assert_close(
        torch.autograd.grad(got[..., 1].sum(), logits)[0], torch.autograd.grad(want[..., 1].sum(), logits)[0]
    )


def test_masked_rows_are_zero_and_have_no_gradient() -> None:
    logits, index = inputs((3, 5, 11))
    mask = torch.arange(15).view(3, 5) % 2
    logprob, entropy = selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    assert (logprob[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all()
    assert (logprob[mask == 1] < 0).all()
    (logprob + entropy).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[mask == 0] == 0).all()
    assert torch.equal(selective_log_softmax(logits, index, row_mask=mask), logprob)


def test_entropy_can_do_without_gradient() -> None:
    logits, index = inputs((3, 11))
    logprob, entropy = selective_log_softmax_and_entropy(logits, index, False)
    assert logprob.requires_grad
    assert not entropy.requires_grad


def test_rows_that_are_views_of_longer_ones_are_read_where_they_lie() -> None:
    logits, index = inputs((3, 6, 11))
    torch.testing.assert_close(
        selective_log_softmax(logits[:, 1:5], index[:, 1:5]), selective_log_softmax(logits, index)[:, 1:5]
    )


@pytest.mark.parametrize("function", [selective_log_softmax, selective_log_softmax_and_entropy])
def test_a_temperature_must_be_positive(function: Callable[..., Any]) -> None:
    logits, index = inputs((3, 11))
    with pytest.raises(ValueError, match="temperature must be positive"):
        function(logits, index, temperature=0.0)


def test_several_classes_may_be_ignored_or_none() -> None:
    logits, index = inputs((3, 5, 11))
    several = torch.stack([index, torch.full_like(index, -100)], -1)
    for order in (several, several.flip(-1)):
        got = selective_log_softmax(logits, order)
        torch.testing.assert_close(got[order >= 0].view(3, 5), selective_log_softmax(logits, index))
        assert (got[order < 0] == 0).all()
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(selective_log_softmax(logits, index).sum(), logits)[0], rtol=1e-5, atol=1e-6
    )
    assert selective_log_softmax(logits, several[..., :0]).shape == (3, 5, 0)
