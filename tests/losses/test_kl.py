from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastrl.losses.kl import KL, k1, k2, k2_straight_through, k3, penalty
from tests import oracle

POINTS = [(-0.1, -0.1), (-0.5, -2.0), (-3.0, -0.2), (-7.0, -6.5), (-1e-3, -4.0)]


@pytest.mark.parametrize(("ours", "theirs"), [(k1, oracle.k1), (k2, oracle.k2), (k3, oracle.k3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_schulmans(ours, theirs, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    logprob = torch.tensor([p[0] for p in POINTS], dtype=dtype, requires_grad=True)
    value = ours(logprob, torch.tensor([p[1] for p in POINTS], dtype=dtype))
    (slope,) = torch.autograd.grad(value.sum(), logprob)
    truth = torch.tensor([theirs(*p) for p in POINTS], dtype=torch.float64)
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value.detach().double(), truth[:, 0], **tight)
    torch.testing.assert_close(slope.double(), truth[:, 1], **tight)


def test_a_token_twice_as_likely_under_the_reference() -> None:
    logprob, ref = torch.tensor([math.log(0.2)]), torch.tensor([math.log(0.4)])
    assert k1(logprob, ref).item() == pytest.approx(-math.log(2))
    assert k2(logprob, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logprob, ref).item() == pytest.approx(2 - 1 - math.log(2))


def test_k3_keeps_its_digits_next_to_the_reference() -> None:
    ref = torch.zeros(1)
    assert k3(torch.tensor([1e-3]), ref).item() == pytest.approx(5e-7, rel=1e-3)


def test_straight_through_shows_one_estimator_and_pulls_with_k2() -> None:
    for estimator in (k1, k3):
        logprob = torch.tensor([-0.5, -3.0], dtype=torch.float64, requires_grad=True)
        ref = torch.tensor([-2.0, -0.2], dtype=torch.float64)
        value = k2_straight_through(logprob, ref, estimator=estimator)
        (slope,) = torch.autograd.grad(value.sum(), logprob)
        torch.testing.assert_close(value, estimator(logprob, ref))
        torch.testing.assert_close(slope, (logprob - ref).detach())


def test_the_record_applies_the_gradient_it_names() -> None:
    logprob = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0], dtype=torch.float64)
    (own,) = torch.autograd.grad(penalty(KL(k3, 0.1), logprob, ref).sum(), logprob)
    (carried,) = torch.autograd.grad(penalty(KL(k3, 0.1, gradient=k2), logprob, ref).sum(), logprob)
    torch.testing.assert_close(own, torch.tensor([1 - math.exp(-1.5)], dtype=torch.float64))
    torch.testing.assert_close(carried, torch.tensor([1.5], dtype=torch.float64))


def test_k2_has_the_exact_gradient_of_the_reverse_kl_in_expectation_and_k1_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    for estimator, expected in ((k2, exact), (k1, torch.zeros_like(exact))):
        loss = (logp.detach().exp() * estimator(logp, ref)).sum()
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(slope, expected)


def test_the_limit_holds_the_difference_and_stops_its_gradient() -> None:
    logprob = torch.tensor([-100.0, -1.0], requires_grad=True)
    value = partial(k3, limit=2.0)(logprob, torch.zeros(2))
    (slope,) = torch.autograd.grad(value.sum(), logprob)
    assert value[0].item() == pytest.approx(math.exp(2) - 3)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1 - math.e]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"placement": "prompt"}, "placement"),
        ({"coef": -1.0}, "at least 0"),
        ({"placement": "reward", "gradient": k2}, "constant"),
    ],
)
def test_a_record_that_means_nothing_is_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KL(**{"estimator": k1, "coef": 0.1, **arguments})  # type: ignore[arg-type]
